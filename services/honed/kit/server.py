"""One way to start a service: gRPC listeners, health, reflection, metrics, and a graceful end on SIGTERM.

A service has a public listener, may have a control listener (another port, so that it is never reachable from where
applications are), and a health-only port for probes, which carry no certificate and no token.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from honed.kit import connections, metrics
from honed.kit.address import cannot_listen, host_port
from honed.kit.channel_options import MAX_MESSAGE_BYTES
from honed.kit.health import Health
from honed.kit.interceptor import CallInterceptor
from honed.kit.tls import TlsFiles
from honed.kit.tokens import TokenTable

logger = logging.getLogger(__name__)

MAX_CONNECTION_AGE_MS = 10_000
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Clients ping during long generations; without this a server takes that for an attack (spelt without `recv`).
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client asks a name again only when a connection ends. So each ends after this time, and what is in flight on it goes on:
    # a new replica gets its share, and is known before the one that it replaces leaves (`minReadySeconds` in deploy/).
    ("grpc.max_connection_age_ms", MAX_CONNECTION_AGE_MS),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a shared port
)

REFLECTION_METHODS = frozenset(
    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha")
)
PROBES = 256
"""Checks and watches of the health port at once."""


@dataclass(frozen=True)
class Servicer:
    """One gRPC service to register: its full name, and the generated function with the object that it takes."""

    full_name: str
    add: Callable[[Any, Any], None]
    implementation: object


@dataclass(frozen=True)
class Listener:
    """A port and the services on it.

    Attributes:
        host: Where it listens.
        port: 0 for any free one.
        servicers: What it serves.
        when_ready: Takes the port at the start, so that nobody else gets it, and answers from `Server.ready` on. A client
            that connects before waits meanwhile, or goes to another replica; none gets an error from one that still loads.
    """

    host: str
    port: int
    servicers: Sequence[Servicer]
    when_ready: bool = False


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
        linger_s: how long the ports stay open after SIGTERM with readiness off, so that load balancers see it first.
        drain_s: how long calls in flight may go on once the ports are closed.
        max_calls: calls in flight on one listener; above it the answer is RESOURCE_EXHAUSTED.
        max_streams: calls in flight on one connection; a client waits with those above it.
    """

    host: str = "127.0.0.1"
    health_port: int = 0
    metrics_port: int = 0
    tokens: TokenTable | None = None
    tls: TlsFiles | None = None
    reflection: bool = True
    deadline_s: float = 600.0
    open_ended: frozenset[str] = field(default_factory=frozenset)
    linger_s: float = 0.0
    drain_s: float = 20.0
    max_calls: int = 2048
    max_streams: int = 1024


class Server:
    """The gRPC side of a service process."""

    def __init__(self, listeners: Sequence[Listener], options: ServerOptions) -> None:
        """Prepares the listeners; `start` opens them."""
        self._listeners = listeners
        self.options = options
        self._servers: list[grpc.aio.Server] = []
        self._unstarted: list[grpc.aio.Server] = []
        self._interceptors: list[CallInterceptor] = []
        self._prober: grpc.aio.Server | None = None
        self.health = Health()
        self.ports: list[int] = []

    async def start(self) -> None:
        """Opens every port. Liveness serves from here on; readiness waits for `ready`.

        Raises:
            OSError: a port is taken; names it.
        """
        options = self.options
        for listener in self._listeners:
            _warn_of_plain_text(listener, options)
            interceptor = CallInterceptor(options.tokens, options.deadline_s, options.open_ended, REFLECTION_METHODS)
            server = grpc.aio.server(
                interceptors=(interceptor,),
                options=(*SERVER_OPTIONS, ("grpc.max_concurrent_streams", options.max_streams)),
                maximum_concurrent_rpcs=options.max_calls,
            )
            names = [s.full_name for s in listener.servicers]
            for servicer in listener.servicers:
                servicer.add(servicer.implementation, server)
                await self.health.set(servicer.full_name, False)
            if options.reflection:
                reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
            self.ports.append(_bind(server, listener.host, listener.port, options.tls, ", ".join(names)))
            self._servers.append(server)
            if listener.when_ready:
                self._unstarted.append(server)
            self._interceptors.append(interceptor)
        if options.health_port:
            self._prober = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=PROBES)
            health_pb2_grpc.add_HealthServicer_to_server(self.health, self._prober)
            _bind(self._prober, options.host, options.health_port, None, "health")
            await self._prober.start()
        if options.metrics_port:
            metrics.expose(options.host, options.metrics_port)
        for server in self._servers:
            if server not in self._unstarted:
                await server.start()

    async def ready(self, serving: bool = True) -> None:
        """Sets the readiness of every service of this process; ignored once a stop has begun."""
        while serving and self._unstarted:
            await self._unstarted.pop().start()
        for listener in self._listeners:
            for servicer in listener.servicers:
                await self.health.set(servicer.full_name, serving)

    async def stop(self) -> None:
        """Turns readiness off, lets calls in flight end within the drain time, and closes every port."""
        await self.health.shut_down()
        await self.drain()
        await self.close()

    async def drain(self) -> None:
        """Closes the ports of the services, and lets calls in flight end within the drain time; watches end at once."""
        for interceptor in self._interceptors:
            interceptor.end_streams()
        await asyncio.gather(*(server.stop(self.options.drain_s) for server in self._servers))

    async def close(self) -> None:
        """Closes what is still open at once, the health port last of all: a supervisor may ask to the end."""
        await asyncio.gather(*(server.stop(None) for server in self._servers))  # after `drain` there is nothing left
        await self.health.close()
        if self._prober is not None:
            await self._prober.stop(1.0)


class Lifecycle(asyncio.Event):
    """How far the end of a service has come. Itself is set first: take no new work.

    Attributes:
        drained: set when the calls in flight have ended: what they used can be closed.
    """

    def __init__(self) -> None:
        """Nothing has ended."""
        super().__init__()
        self.drained = asyncio.Event()


async def serve_until_signalled(server: Server, work: Callable[[Lifecycle], Awaitable[None]]) -> None:
    """Runs a service to its end.

    Opens the ports and runs `work`: load, announce readiness by `server.ready`, process the queue. On SIGTERM or SIGINT:
        1. `work`'s argument is set and readiness goes off; the ports stay open for `linger_s`.
        2. The ports close, watches end, and calls in flight have `drain_s` to end.
        3. `drained` is set, and `work` has `drain_s` to close what the calls used and to return; then it is cancelled.
    If `work` ends or fails on its own, so does the service: a supervisor starts it again.
    """
    lifecycle = Lifecycle()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lifecycle.set)
    await server.start()
    task = asyncio.ensure_future(work(lifecycle))
    waiter = asyncio.ensure_future(lifecycle.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        await server.health.shut_down()
        if lifecycle.is_set():
            await asyncio.sleep(server.options.linger_s)
        await server.drain()
        lifecycle.set()
        lifecycle.drained.set()
        await asyncio.wait({task}, timeout=server.options.drain_s)
        if not task.done():
            logger.warning("work did not stop in time; cancelling it")
    finally:
        waiter.cancel()
        task.cancel()
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        finally:
            await server.close()


def _warn_of_plain_text(listener: Listener, options: ServerOptions) -> None:
    if options.tokens is not None and options.tls is None and not is_loopback(listener.host):
        logger.warning(
            "tokens travel in plain text: whoever sees the network's packets can use them; set security.tls, "
            "or let a service mesh encrypt between hosts",
            extra={"host": listener.host},
        )


def is_loopback(host: str) -> bool:
    """Tells whether a host is this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(server: grpc.aio.Server, host: str, port: int, tls: TlsFiles | None, what: str) -> int:
    address = host_port(host, port)
    try:
        bound = server.add_secure_port(address, tls.server_credentials()) if tls else server.add_insecure_port(address)
    except RuntimeError as error:
        raise cannot_listen(host, port, what) from error
    if bound == 0:
        raise cannot_listen(host, port, what)
    connections.listening(bound, what)
    return bound
