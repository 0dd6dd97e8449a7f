"""Optional mutual TLS: the three files that both sides of a connection need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the authority that signed the peers, and this process's own certificate and key."""

    authority: Path
    certificate: Path
    key: Path

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server that also asks its clients for a certificate."""
        return grpc.ssl_server_credentials(
            [(self._read(self.key), self._read(self.certificate))],
            root_certificates=self._read(self.authority),
            require_client_auth=True,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a client that shows its certificate."""
        return grpc.ssl_channel_credentials(self._read(self.authority), self._read(self.key), self._read(self.certificate))

    @staticmethod
    def _read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"TLS file {path} cannot be read: {error.strerror}; check security.tls in the run file") from error
