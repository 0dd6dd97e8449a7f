"""Optional mutual TLS: the three files that both sides of a connection need, read again when they are replaced."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import grpc

from honed.kit.address import joined_hosts
from honed.kit.from_files import FromFiles

_CHECKED_NAME: Final = "grpc.ssl_target_name_override"


class ChannelTls(Protocol):
    """What a client's channel needs for mutual TLS."""

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a client that shows its certificate."""

    def channel_options(self, target: str) -> tuple[tuple[str, str], ...]:
        """The name that the certificates at a target are checked against."""


@dataclass(frozen=True)
class TlsTexts:
    """The three files' contents, PEM, for a key that no file may hold.

    Attributes:
        server_name: name that every server's certificate carries.
    """

    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    server_name: str

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """See `ChannelTls`."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    def channel_options(self, target: str) -> tuple[tuple[str, str], ...]:
        """See `ChannelTls`; the same for each target."""
        return ((_CHECKED_NAME, self.server_name),)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the authority that signed the peers, and this process's own certificate and key.

    Attributes:
        authority: certificates of whom this process trusts.
        certificate: this process's own.
        key: of the certificate.
        server_name: name that every server's certificate carries; empty where each carries the
            address that the server is called by.
    """

    authority: Path
    certificate: Path
    key: Path
    server_name: str = ""

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server that also asks its clients for a certificate.

        Each new connection is served with the files as they are then: a certificate is replaced
        without a restart.

        Raises:
            ValueError: a file cannot be read.
        """
        source = FromFiles(self._paths, self._server_configuration)
        served = first = source.get()

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            before, served = served, source.get()
            return None if served is before else served

        # None means that nothing changed, which the stubs do not know.
        return grpc.dynamic_ssl_server_credentials(first, renewed, require_client_authentication=True)  # type: ignore[arg-type]

    def renewed_channel_credentials(self) -> FromFiles[grpc.ChannelCredentials]:
        """Credentials of a client that shows its certificate, made anew when a file is replaced.

        Raises:
            ValueError: a file cannot be read.
        """
        return FromFiles(self._paths, self.channel_credentials)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a client that shows its certificate, of the files as they are now.

        Raises:
            ValueError: a file cannot be read.
        """
        return grpc.ssl_channel_credentials(self._read(self.authority), self._read(self.key), self._read(self.certificate))

    def channel_options(self, target: str) -> tuple[tuple[str, str], ...]:
        """The name that the certificates at a target are checked against, where gRPC cannot tell.

        For a target of several addresses gRPC would compare a certificate with all of them as one name.

        Raises:
            ValueError: its processes are on several hosts, and no `server_name` is set.
        """
        if self.server_name:
            return ((_CHECKED_NAME, self.server_name),)
        hosts = set(joined_hosts(target))
        if len(hosts) > 1:
            raise ValueError(
                f"the certificates at {target} cannot be checked: set security.tls.server_name to a name that all of them carry"
            )
        return tuple((_CHECKED_NAME, host) for host in hosts)

    @property
    def _paths(self) -> tuple[Path, Path, Path]:
        return self.authority, self.certificate, self.key

    def _server_configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = (self._read(self.key), self._read(self.certificate))
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=self._read(self.authority))

    @staticmethod
    def _read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"TLS file {path} cannot be read: {error.strerror}; check security.tls in the run file") from error
