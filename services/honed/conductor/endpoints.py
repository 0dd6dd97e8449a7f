"""Gives each service of a local run its ports, and tells when a service is ready."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from honed.config import RunSettings, ServerSettings

_PORTS = ("port", "control_port", "health_port", "metrics_port")


def with_ports(settings: RunSettings) -> RunSettings:
    """The settings with every port 0 of a service replaced by a free one. The ports stay the same when a service restarts."""
    taken: list[socket.socket] = []

    def free(host: str) -> int:
        # Held until all are chosen, so that none is chosen twice.
        probe = socket.socket()
        probe.bind((host, 0))
        taken.append(probe)
        port: int = probe.getsockname()[1]
        return port

    tree: dict[str, Any] = {}
    try:
        for name in type(settings).model_fields:
            section = getattr(settings, name)
            if isinstance(section, ServerSettings):
                chosen = {p: free(section.host) for p in _PORTS if getattr(section, p, None) == 0}
                tree[name] = section.model_copy(update=chosen)
        queue = settings.queue
        if queue.url is None and queue.port == 0:
            tree["queue"] = queue.model_copy(update={"port": free("127.0.0.1")})
    finally:
        for probe in taken:
            probe.close()
    return settings.model_copy(update=tree)


def ready_probe(section: ServerSettings, service: str) -> Callable[[], Awaitable[None]]:
    """A wait for the service's readiness, by its health port."""

    async def wait() -> None:
        async with grpc.aio.insecure_channel(f"{section.host}:{section.health_port}") as channel:
            probe = health_pb2_grpc.HealthStub(channel)
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    answer = await probe.Check(health_pb2.HealthCheckRequest(service=service), timeout=2)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                await asyncio.sleep(0.1)

    return wait
