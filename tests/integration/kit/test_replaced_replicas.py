"""Claims about a client of a name with several addresses while the replicas behind it are replaced one by one."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from typing import Any

import grpc

from honed.kit.channel_options import CHANNEL_OPTIONS
from honed.kit.server import MAX_CONNECTION_AGE_MS, SERVER_OPTIONS
from honed.queue.embedded import free_port

A = 1
"""The type of a DNS record with an IPv4 address."""

LATE_S = 1.5
"""How long a busy DNS server takes."""


class Names(asyncio.DatagramProtocol):
    """A DNS server that knows the same addresses for every name."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        end = data.index(0, 12) + 5
        addresses = self.addresses if struct.unpack(">H", data[end - 4 : end - 2])[0] == A else []
        answer = data[:2] + struct.pack(">HHHHH", 0x8580, 1, len(addresses), 0, 0) + data[12:end]
        for address in addresses:
            answer += struct.pack(">HHHIH", 0xC00C, A, 1, 5, 4) + socket.inet_aton(address)
        asyncio.get_running_loop().call_later(LATE_S, self.transport.sendto, answer, addr)


def counted(answers: Counter[str], address: str, port: int) -> grpc.aio.Server:
    async def answer(request: bytes, context: Any) -> bytes:
        answers[address] += 1
        await asyncio.sleep(0.02)
        return request

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((Handler(),))
    server.add_insecure_port(f"{address}:{port}")
    return server


async def test_a_new_replica_is_used_and_the_next_one_leaves_without_a_failed_call() -> None:
    """Without an end to connections the newcomer gets nothing, and calls fail until the name was asked again."""
    answers: Counter[str] = Counter()
    failed: list[str] = []
    port = free_port()
    transport, names = await asyncio.get_running_loop().create_datagram_endpoint(Names, local_addr=("127.0.0.1", 0))
    dns = transport.get_extra_info("sockname")[1]
    target = f"dns://127.0.0.1:{dns}/generation.test:{port}"
    first, second, third = (counted(answers, f"127.0.0.{last}", port) for last in (2, 3, 4))
    await first.start()
    await second.start()
    names.addresses = ["127.0.0.2", "127.0.0.3"]
    async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
        call = channel.unary_unary("/any/method")

        async def ask() -> None:
            while True:
                try:
                    await call(b"x", timeout=10)
                except grpc.aio.AioRpcError as error:
                    failed.append(f"{error.code()}: {error.details()}")

        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(ask()) for _ in range(4)]
            await asyncio.sleep(LATE_S + 1)
            names.addresses = ["127.0.0.3"]
            await first.stop(5)
            await asyncio.sleep(LATE_S + 1)
            await third.start()
            names.addresses = ["127.0.0.3", "127.0.0.4"]
            await asyncio.sleep(1.2 * MAX_CONNECTION_AGE_MS / 1000 + LATE_S + 1)
            newcomer = answers["127.0.0.4"]
            names.addresses = ["127.0.0.4"]
            await second.stop(5)
            await asyncio.sleep(LATE_S + 3)
            for task in asking:
                task.cancel()
    await third.stop(0)
    transport.close()
    assert failed == []
    assert newcomer > 0
    assert answers["127.0.0.2"] > 0
    assert answers["127.0.0.3"] > 0


def test_a_deployment_waits_until_every_client_knows_its_new_pods() -> None:
    from tests.deploy.manifests import named, overlay

    for name in ("honed-generation", "honed-reward"):
        spec = named(overlay("local-cpu"), "Deployment", name)["spec"]
        assert spec["minReadySeconds"] * 1000 > 1.1 * MAX_CONNECTION_AGE_MS, name
