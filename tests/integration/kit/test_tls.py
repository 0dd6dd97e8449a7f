"""Mutual TLS: peers with a certificate of the authority talk, others do not."""

import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from honed.kit.channel import connect
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.kit.tls import TlsFiles
from honed.v1 import preference_pb2, preference_pb2_grpc


class Preference(preference_pb2_grpc.PreferenceServiceServicer):
    async def GetStats(self, request: Any, context: Any) -> Any:
        return preference_pb2.GetStatsResponse(judgements=7)


class Authority:
    """Signs certificates for localhost."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory, name
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
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(self.key, hashes.SHA256())
        )


async def test_only_peers_of_the_same_authority_are_served(tmp_path: Path) -> None:
    ours, other = Authority(tmp_path, "ours"), Authority(tmp_path, "other")
    servicer = Servicer("honed.v1.PreferenceService", preference_pb2_grpc.add_PreferenceServiceServicer_to_server, Preference())
    server = Server([Listener("localhost", 0, [servicer])], ServerOptions(tls=ours.issue("server")))
    await server.start()
    target = f"localhost:{server.ports[0]}"

    async def ask(tls: TlsFiles | None) -> int:
        async with connect(target, tls=tls) as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            answer = await stub.GetStats(preference_pb2.GetStatsRequest(), timeout=3)
            return int(answer.judgements)

    try:
        assert await ask(ours.issue("client")) == 7
        for stranger in (None, TlsFiles(tmp_path / "ours.pem", *_pair(other.issue("stranger")))):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask(stranger)
            assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    finally:
        await server.stop()


async def test_replaced_certificates_are_used_by_the_next_connection(tmp_path: Path) -> None:
    first, second = Authority(tmp_path, "first"), Authority(tmp_path, "second")
    of_server, of_client = _laid_out(first.issue("a"), tmp_path / "server"), _laid_out(first.issue("b"), tmp_path / "client")
    servicer = Servicer("honed.v1.PreferenceService", preference_pb2_grpc.add_PreferenceServiceServicer_to_server, Preference())
    server = Server([Listener("localhost", 0, [servicer])], ServerOptions(tls=of_server))
    await server.start()

    async def ask(channel: grpc.aio.Channel) -> int:
        stub = preference_pb2_grpc.PreferenceServiceStub(channel)
        return int((await stub.GetStats(preference_pb2.GetStatsRequest(), timeout=3)).judgements)

    try:
        async with connect(f"localhost:{server.ports[0]}", tls=of_client) as channel:
            assert await ask(channel) == 7
            # The open channel takes the client's new files, which the server's do not fit yet.
            _laid_out(second.issue("c"), tmp_path / "client")
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(channel)
            _laid_out(second.issue("d"), tmp_path / "server")
            async with connect(f"localhost:{server.ports[0]}", tls=of_client) as other:
                assert await ask(other) == 7
    finally:
        await server.stop()


async def test_a_broken_certificate_file_leaves_the_one_before_in_use(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    files = _laid_out(authority.issue("a"), tmp_path / "server")
    servicer = Servicer("honed.v1.PreferenceService", preference_pb2_grpc.add_PreferenceServiceServicer_to_server, Preference())
    server = Server([Listener("localhost", 0, [servicer])], ServerOptions(tls=files))
    await server.start()
    files.certificate.unlink()
    try:
        async with connect(f"localhost:{server.ports[0]}", tls=authority.issue("client")) as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            assert (await stub.GetStats(preference_pb2.GetStatsRequest(), timeout=3)).judgements == 7
    finally:
        await server.stop()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    files = TlsFiles(tmp_path / "ca.pem", tmp_path / "a.crt", tmp_path / "a.key")
    with pytest.raises(ValueError, match=r"a\.key cannot be read"):
        files.server_credentials()


def _pair(files: TlsFiles) -> tuple[Path, Path]:
    return files.certificate, files.key


def _laid_out(files: TlsFiles, directory: Path) -> TlsFiles:
    """The same content under names that stay, as a mounted secret has them."""
    directory.mkdir(exist_ok=True)
    for path, name in ((files.authority, "ca.pem"), (files.certificate, "tls.crt"), (files.key, "tls.key")):
        partial = directory / f"{name}.new"
        partial.write_bytes(path.read_bytes())
        partial.rename(directory / name)
    return TlsFiles(directory / "ca.pem", directory / "tls.crt", directory / "tls.key")
