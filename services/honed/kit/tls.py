"""Optional mutual TLS: the three files that both sides of a connection need, read again when they are replaced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from honed.kit.from_files import FromFiles


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the authority that signed the peers, and this process's own certificate and key."""

    authority: Path
    certificate: Path
    key: Path

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
