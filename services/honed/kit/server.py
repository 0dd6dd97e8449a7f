"""One way to start a service: gRPC listeners, health, reflection, metrics, and a graceful end on SIGTERM.

A service has a public listener, may have a control listener (another port, so that it is never reachable from where
applications are), and a health-only port for probes, which carry no certificate and no token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from honed.kit import metrics
from honed.kit.channel_options import MAX_MESSAGE_BYTES
from honed.kit.health import Health
from honed.kit.interceptor import CallInterceptor
from honed.kit.tls import TlsFiles
from honed.kit.tokens import TokenTable

logger = logging.getLogger(__name__)

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Clients ping during long generations; without this a server takes that for an attack (spelt without `recv`).
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a shared port
)


@dataclass(frozen=True)
class Servicer:
    """One gRPC service to register: its full name, and the generated function with the object that it takes."""

    full_name: str
    add: Callable[[Any, Any], None]
    implementation: object


@dataclass(frozen=True)
class Listener:
    """A port and the services on it."""

    host: str
    port: int
    servicers: Sequence[Servicer]


@dataclass(frozen=True)
class ServerOptions:
    """How a service listens.

    Attributes:
        health_port: plain-text port with the health service alone; 0 for none.
        metrics_port: HTTP port of `/metrics`; 0 for none.
        tokens: who may call what; None switches authentication off.
        tls: certificate files; None serves plain text, for loopback and service meshes.
        reflection: lets grpcurl and the like ask for the contract.
        deadline_s: the longest that a call may take.
        open_ended: full method names of watches, which have no deadline.
        drain_s: how long calls in flight may go on after SIGTERM.
    """

    host: str = "127.0.0.1"
    health_port: int = 0
    metrics_port: int = 0
    tokens: TokenTable | None = None
    tls: TlsFiles | None = None
    reflection: bool = True
    deadline_s: float = 600.0
    open_ended: frozenset[str] = field(default_factory=frozenset)
    drain_s: float = 20.0


class Server:
    """The gRPC side of a service process."""

    def __init__(self, listeners: Sequence[Listener], options: ServerOptions) -> None:
        """Prepares the listeners; `start` opens them."""
        self._listeners = listeners
        self._options = options
        self._servers: list[grpc.aio.Server] = []
        self.health = Health()
        self.ports: list[int] = []

    async def start(self) -> None:
        """Opens every port. Liveness serves from here on; readiness waits for `ready`.

        Raises:
            OSError: a port is taken; names it.
        """
        options = self._options
        for listener in self._listeners:
            server = grpc.aio.server(
                interceptors=(CallInterceptor(options.tokens, options.deadline_s, options.open_ended),),
                options=SERVER_OPTIONS,
            )
            names = [s.full_name for s in listener.servicers]
            for servicer in listener.servicers:
                servicer.add(servicer.implementation, server)
                await self.health.set(servicer.full_name, False)
            if options.reflection:
                reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
            self.ports.append(_bind(server, listener.host, listener.port, options.tls, ", ".join(names)))
            self._servers.append(server)
        if options.health_port:
            prober = grpc.aio.server(options=SERVER_OPTIONS)
            health_pb2_grpc.add_HealthServicer_to_server(self.health, prober)
            _bind(prober, options.host, options.health_port, None, "health")
            self._servers.append(prober)
        if options.metrics_port:
            metrics.expose(options.host, options.metrics_port)
        for server in self._servers:
            await server.start()

    async def ready(self, serving: bool = True) -> None:
        """Sets the readiness of every service of this process."""
        for listener in self._listeners:
            for servicer in listener.servicers:
                await self.health.set(servicer.full_name, serving)

    async def stop(self) -> None:
        """Turns readiness off, lets calls in flight end within the drain time, and closes the ports."""
        await self.health.shut_down()
        await asyncio.gather(*(server.stop(self._options.drain_s) for server in self._servers))


async def serve_until_signalled(server: Server, work: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Runs a service to its end.

    Opens the ports, runs `work` (load, announce readiness by `server.ready`, process the queue), and on SIGTERM or SIGINT sets
    the event that `work` got, waits for it, drains the calls in flight, and returns. If `work` ends or fails on its own, so
    does the service: a supervisor starts it again.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await server.start()
    task = asyncio.ensure_future(work(stopping))
    waiter = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        await server.stop()
        if not task.done():
            # Calls have ended; what is left of the work is told to stop and gets as long again.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(task), server._options.drain_s)
        if not task.done():
            logger.warning("work did not stop in time; cancelling it")
    finally:
        waiter.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _bind(server: grpc.aio.Server, host: str, port: int, tls: TlsFiles | None, what: str) -> int:
    address = f"{host}:{port}"
    try:
        bound = server.add_secure_port(address, tls.server_credentials()) if tls else server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address} for {what}: is the port taken by another run?") from error
    if bound == 0:
        raise OSError(f"cannot listen on {address} for {what}: is the port taken by another run?")
    return bound
