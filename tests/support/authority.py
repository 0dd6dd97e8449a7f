"""A certificate authority for tests."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from honed.kit.tls import TlsFiles


class Authority:
    """Signs certificates for localhost, or for the names given."""

    def __init__(self, directory: Path, name: str, *names: x509.GeneralName) -> None:
        self.directory, self.name, self.names = directory, name, names or (x509.DNSName("localhost"),)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(name, self.key.public_key(), authority=True)
        (directory / f"{name}.pem").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str) -> TlsFiles:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, private = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        signed = self._sign(name, key.public_key(), authority=False)
        certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return TlsFiles(self.directory / f"{self.name}.pem", certificate, private)

    def _sign(self, name: str, key: Any, *, authority: bool) -> x509.Certificate:
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(self.names), critical=False)
            .sign(self.key, hashes.SHA256())
        )
