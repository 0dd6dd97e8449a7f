"""The standard gRPC health service, for liveness and readiness.

The empty service name is liveness: it serves as long as the process does. A service's full name is readiness: it serves when
the service is loaded and at its current version. (grpcio's own asyncio servicer forgets its other watchers when one leaves.)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped library
    """Holds the status of each service and answers checks and watches."""

    def __init__(self) -> None:
        """Starts alive, with no service ready."""
        self._status: dict[str, int] = {"": _Status.SERVING}
        self._changed = asyncio.Condition()

    @property
    def statuses(self) -> Mapping[str, int]:
        """The status of each service by full name."""
        return self._status

    async def set(self, service: str, serving: bool) -> None:
        """Changes one service's readiness and wakes its watchers."""
        async with self._changed:
            self._status[service] = _Status.SERVING if serving else _Status.NOT_SERVING
            self._changed.notify_all()

    async def shut_down(self) -> None:
        """Turns every readiness off, for a drain; liveness stays."""
        for service in [name for name in self._status if name]:
            await self.set(service, False)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> health_pb2.HealthCheckResponse:
        """Answers with the status now."""
        status = self._status.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return _Status(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Sends the status now and at each change."""
        sent = None
        while True:
            status = self._status.get(request.service, _Status.SERVICE_UNKNOWN)
            if status != sent:
                sent = status
                yield _Status(status=status)
            async with self._changed:
                if self._status.get(request.service, _Status.SERVICE_UNKNOWN) == sent:
                    await self._changed.wait()
