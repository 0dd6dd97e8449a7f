"""Mutual TLS: peers with a certificate of the authority talk, others do not."""

import asyncio
import ipaddress
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from tests.support.authority import Authority

from honed._client.peer import Peer
from honed.kit.address import join
from honed.kit.channel import connect
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.kit.tls import TlsFiles
from honed.v1 import preference_pb2, preference_pb2_grpc


class Preference(preference_pb2_grpc.PreferenceServiceServicer):
    def __init__(self, judgements: int = 7) -> None:
        self.judgements = judgements

    async def GetStats(self, request: Any, context: Any) -> Any:
        return preference_pb2.GetStatsResponse(judgements=self.judgements)


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


def replica(host: str, number: int, tls: TlsFiles) -> Server:
    add = preference_pb2_grpc.add_PreferenceServiceServicer_to_server
    servicer = Servicer("honed.v1.PreferenceService", add, Preference(number))
    return Server([Listener(host, 0, [servicer])], ServerOptions(tls=tls))


@asynccontextmanager
async def two_replicas(tls: TlsFiles, *hosts: str) -> AsyncIterator[tuple[list[Server], str]]:
    """Replicas 1 and 2, and the target that joins them."""
    servers = [replica(host, number, tls) for number, host in enumerate(hosts, 1)]
    for server in servers:
        await server.start()
    try:
        yield servers, join([(host, server.ports[0]) for host, server in zip(hosts, servers, strict=True)])
    finally:
        for server in servers:
            await server.stop()


async def answers(target: str, tls: TlsFiles, calls: int = 12) -> set[int]:
    """Which replicas answer calls over one channel."""
    async with connect(target, tls=tls) as channel:
        stub = preference_pb2_grpc.PreferenceServiceStub(channel)
        asked = [await stub.GetStats(preference_pb2.GetStatsRequest(), timeout=5, wait_for_ready=True) for _ in range(calls)]
        return {int(answer.judgements) for answer in asked}


def answers_to_a_client(target: str, tls: TlsFiles, wanted: int = 2) -> set[int]:
    """The same over the synchronous client's channel, which may have reached one replica alone at its first calls."""
    found: set[int] = set()
    until = time.monotonic() + 30
    with Peer("preference", target, tls=tls) as peer:
        stub = preference_pb2_grpc.PreferenceServiceStub(peer.channel)
        while len(found) < wanted and time.monotonic() < until:
            found.add(int(peer.unary(stub.GetStats, preference_pb2.GetStatsRequest(), 5).judgements))
    return found


async def test_one_joint_target_reaches_two_replicas_whose_certificates_carry_their_address(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours", x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    client = ours.issue("client")
    async with two_replicas(ours.issue("server"), "127.0.0.1", "127.0.0.1") as (servers, target):
        assert target.startswith("ipv4:127.0.0.1:")
        assert await answers(target, client) == {1, 2}
        assert await asyncio.to_thread(answers_to_a_client, target, client) == {1, 2}
        await servers[0].stop()
        assert await answers(target, client) == {2}, "a replica that is gone is passed over"


async def test_replicas_of_both_families_are_joined_and_checked_by_the_name_in_the_settings(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")  # for the name localhost
    client = replace(ours.issue("client"), server_name="localhost")
    async with two_replicas(ours.issue("server"), "127.0.0.1", "::1") as (_, target):
        assert target.startswith("ipv6:[::ffff:127.0.0.1]:")
        assert await answers(target, client) == {1, 2}
        assert await asyncio.to_thread(answers_to_a_client, target, client) == {1, 2}
        with pytest.raises(ValueError, match=r"set security\.tls\.server_name"):
            connect(target, tls=ours.issue("nameless"))


async def test_a_joint_target_does_not_weaken_the_check_of_the_name(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")
    async with two_replicas(ours.issue("server"), "127.0.0.1", "127.0.0.1") as (_, target):
        for client in (ours.issue("client"), replace(ours.issue("other"), server_name="elsewhere")):
            async with connect(target, tls=client) as channel:
                stub = preference_pb2_grpc.PreferenceServiceStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.GetStats(preference_pb2.GetStatsRequest(), timeout=5)
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


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
