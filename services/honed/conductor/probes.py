"""Asks a service over its health port: is it alive, is it ready?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from honed.kit.address import host_port
from honed.kit.errors import Unavailable
from honed.settings import ServerSettings

POLL_S = 0.1
CHECK_TIMEOUT_S = 2.0


def ready_probe(section: ServerSettings, service: str) -> Callable[[], Awaitable[None]]:
    """A wait for the service's readiness."""

    async def wait() -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                if await check(section, service, CHECK_TIMEOUT_S):
                    return
            await asyncio.sleep(POLL_S)

    return wait


def alive_probe(section: ServerSettings) -> Callable[[], Awaitable[None]]:
    """One check of liveness; raises when there is no answer, or when a loop of the process stands still (`kit.health`).

    Its caller sets the deadline.
    """

    async def ask() -> None:
        if not await check(section, "", None):
            raise Unavailable("a loop of the process stands still")

    return ask


async def check(section: ServerSettings, service: str, timeout_s: float | None) -> bool:
    """Whether the service is ready; the empty name asks for liveness.

    Raises:
        AioRpcError: the process does not answer.
    """
    async with grpc.aio.insecure_channel(host_port(section.host, section.health_port)) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
