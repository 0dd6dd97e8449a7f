"""The standard gRPC health service, for liveness and readiness.

The empty service name is liveness: it serves as long as every *pulse* of the process beats. A pulse belongs to a loop that must
not stand still, such as a training loop: the loop beats at each turn, and a supervisor that sees NOT_SERVING starts the process
anew. A process that drains is alive: its loops end on purpose, and the drain has a deadline. Checks are answered by the event
loop itself, so a blocked event loop shows as a check that is not answered.
A service's full name is readiness: it serves when the service is loaded and at its current version. (grpcio's own asyncio
servicer forgets its other watchers when one leaves.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_WATCHES = 64
WATCH_EVERY_S = 1.0

_Status = health_pb2.HealthCheckResponse


class Pulse:
    """One loop's sign of life. Any thread may beat."""

    def __init__(self, name: str, limit_s: float, clock: Callable[[], float] = time.monotonic, *, idle: bool = False) -> None:
        """Starts beating now.

        Args:
            name: what beats, for the log.
            limit_s: the longest that may pass between two beats, in seconds.
            clock: gives seconds.
            idle: nothing is expected but in `working`.
        """
        self.name = name
        self.limit_s = limit_s
        self._clock = clock
        self._last = clock()
        self._idle = int(idle)

    def beat(self) -> None:
        """Says that the loop goes on."""
        self._last = self._clock()

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """Inside the block nothing is expected: the loop waits for something that may take any time."""
        self._idle += 1
        try:
            yield
        finally:
            self.beat()
            self._idle -= 1

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Inside the block, within idleness, the loop does something that must come to its end within the limit."""
        self.beat()
        self._idle -= 1
        try:
            yield
        finally:
            self._idle += 1

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Runs what blocks in a thread, as `working`: a hung disk is found though the event loop goes on."""
        with self.working():
            return await asyncio.to_thread(work)

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat; 0 while it is idle."""
        return 0.0 if self._idle > 0 else self._clock() - self._last

    @property
    def stopped(self) -> bool:
        """Whether the loop should have beaten by now."""
        return self.silent_s > self.limit_s


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped library
    """Holds the status of each service and answers checks and watches."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts alive, with no service ready. `clock` gives seconds."""
        self._clock = clock
        self._ready: dict[str, bool] = {}
        self._pulses: list[Pulse] = []
        self._reported: frozenset[str] = frozenset()
        self._changed = asyncio.Condition()
        self._watches = 0
        self._stopping = self._closed = False

    @property
    def statuses(self) -> Mapping[str, int]:
        """The status of each service by full name."""
        return {name: self._status(name) for name in ("", *self._ready)}

    def pulse(self, name: str, limit_s: float, *, idle: bool = False) -> Pulse:
        """Makes liveness depend on a loop: it turns NOT_SERVING when the loop has not beaten for `limit_s` seconds.

        With `idle` it is expected to beat in its `working` blocks alone.
        """
        pulse = Pulse(name, limit_s, self._clock, idle=idle)
        self._pulses.append(pulse)
        return pulse

    async def set(self, service: str, serving: bool) -> None:
        """Changes one service's readiness and wakes its watchers. Once a stop has begun nothing turns ready any more."""
        async with self._changed:
            self._ready[service] = serving and not self._stopping
            self._changed.notify_all()

    async def shut_down(self) -> None:
        """Turns every readiness off, for a drain; liveness stays."""
        self._stopping = True
        for service in list(self._ready):
            await self.set(service, False)

    async def close(self) -> None:
        """Ends every watch."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> health_pb2.HealthCheckResponse:
        """Answers with the status now."""
        if request.service and request.service not in self._ready:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return _Status(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Sends the status now and at each change."""
        if self._watches >= MAX_WATCHES:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHES} watches are open; use Check")
        self._watches += 1
        try:
            sent = None
            while not self._closed:
                status = self._status(request.service)
                if status != sent:
                    sent = status
                    yield _Status(status=status)
                async with self._changed:
                    if self._status(request.service) == sent and not self._closed:
                        # A pulse stops without anybody's doing: that is looked for.
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(self._changed.wait(), WATCH_EVERY_S)
        finally:
            self._watches -= 1

    def _status(self, service: str) -> int:
        if service and service not in self._ready:
            return int(_Status.SERVICE_UNKNOWN)
        serving = self._ready[service] if service else not self._stopped_pulses()
        return int(_Status.SERVING if serving else _Status.NOT_SERVING)

    def _stopped_pulses(self) -> frozenset[str]:
        stopped = {} if self._stopping else {pulse.name: pulse.silent_s for pulse in self._pulses if pulse.stopped}
        names = frozenset(stopped)
        if names - self._reported:
            logger.error("a loop stands still; this process should be started anew", extra={"silent_s": stopped})
        self._reported = names
        return names
