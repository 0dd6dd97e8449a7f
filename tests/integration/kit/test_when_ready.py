"""A listener that answers from readiness on: its port is taken before, and no caller gets an error meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from honed.kit.health import Health
from honed.kit.server import Listener, Server, ServerOptions, Servicer


def listening(port: int = 0) -> Server:
    servicer = Servicer("grpc.health.v1.Health", health_pb2_grpc.add_HealthServicer_to_server, Health())
    return Server([Listener("127.0.0.1", port, [servicer], when_ready=True)], ServerOptions(drain_s=1.0, reflection=False))


async def check(channel: grpc.aio.Channel, **options: Any) -> int:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5, **options)
    return int(answer.status)


async def test_a_caller_before_readiness_waits_and_is_answered() -> None:
    server = listening()
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports[0]}") as channel:
        early = asyncio.create_task(check(channel))
        done, _ = await asyncio.wait([early], timeout=0.2)
        assert not done, "neither an answer nor an error"
        await server.ready()
        assert await early == health_pb2.HealthCheckResponse.SERVING
    await server.stop()


async def test_the_port_is_taken_from_the_start() -> None:
    server = listening()
    await server.start()
    with pytest.raises(OSError, match="is the port taken"):
        await listening(server.ports[0]).start()
    await server.stop()


async def test_calls_go_to_the_replica_that_is_ready() -> None:
    ready, loading = listening(), listening()
    for server in (ready, loading):
        await server.start()
    await ready.ready()
    target = "ipv4:" + ",".join(f"127.0.0.1:{server.ports[0]}" for server in (loading, ready))
    options = [("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}')]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        for _ in range(20):  # without a retry
            assert await check(channel) == health_pb2.HealthCheckResponse.SERVING
    await ready.stop()
    await loading.stop()
