"""From the settings tree to the kit's own arguments: how each service listens, calls the others, and reaches Redis."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import grpc

from honed.config import RunSettings
from honed.kit.channel import connect
from honed.kit.errors import FailedPrecondition
from honed.kit.from_files import FromFiles
from honed.kit.server import ServerOptions, is_loopback
from honed.kit.tls import TlsFiles
from honed.kit.tokens import TokenTable, ensure_local_tokens, local_token_file, token_source
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.settings import QueueSettings
from honed.settings import ServerSettings
from honed.topology import SERVICES

LINGER_S = 3.0

service_name: ContextVar[str] = ContextVar("honed_service", default="conductor")
"""The service that this process is; `honed serve` and `honed job` set it. It names the token of calls to other services."""


def server_options(settings: RunSettings, section: ServerSettings, open_ended: Iterable[str] = ()) -> ServerOptions:
    """How a service of this run listens.

    Raises:
        ValueError: the token table or a TLS file cannot be read.
    """
    linger_s = section.linger_s
    if linger_s is None:
        # A run on one machine has no load balancer to wait for.
        linger_s = 0.0 if is_loopback(section.host) else LINGER_S
    return ServerOptions(
        host=section.host,
        health_port=section.health_port,
        metrics_port=section.metrics_port,
        tokens=_token_table(settings) if settings.security.authentication else None,
        tls=tls_files(settings),
        reflection=section.reflection,
        deadline_s=section.deadline_s,
        open_ended=frozenset(open_ended),
        linger_s=linger_s,
        drain_s=section.drain_s,
        max_calls=section.max_calls,
        max_streams=section.max_streams,
    )


def check_start(settings: RunSettings, service: str) -> None:
    """Asserts what a service needs of its settings' files, before what takes seconds to load.

    Raises:
        FailedPrecondition: it needs Redis, and no URL is set.
        ValueError: the token table, a TLS file or the password of Redis cannot be read.
    """
    server_options(settings, getattr(settings, service))
    if service in ("generation", "reward", "learner"):
        redis_url(settings)


def internal_channel(settings: RunSettings, target: str, service: str | None = None) -> grpc.aio.Channel:
    """A channel to another service of the run.

    Args:
        settings: the run's.
        target: a gRPC target.
        service: whose token the calls carry; None for this process's own (`service_name`).

    Raises:
        ValueError: the token or a TLS file cannot be read.
    """
    return connect(target, internal_token(settings, service), tls_files(settings))


def internal_token(settings: RunSettings, service: str | None = None) -> Callable[[], str] | None:
    """The token of one service of the run, as its file holds it at each call; None when authentication is off.

    Raises:
        ValueError: the file is missing or empty.
    """
    if not settings.security.authentication:
        return None
    return token_source(local_token_file(settings.tokens_directory, service or service_name.get()))


def tls_files(settings: RunSettings) -> TlsFiles | None:
    """The run's certificate files, None for plain text."""
    tls = settings.security.tls
    return None if tls is None else TlsFiles(tls.authority, tls.certificate, tls.key, tls.server_name or "")


def redis_link(settings: RunSettings, retry: RetryPolicy, embedded: str | None = None, **options: Any) -> RedisLink:
    """The link of this process to the run's Redis. A password in a file is read for each new connection.

    Args:
        settings: The run's.
        retry: How long to wait for a Redis that is gone.
        embedded: The URL of the embedded server, which has no password; for runs that name no Redis.
        options: Further ones of `RedisLink`.

    Raises:
        FailedPrecondition: no URL is set: the launcher, or whoever deploys, sets it.
        InvalidArgument: the URL cannot be read.
        ValueError: the password file cannot be read.
    """
    url, password = settings.queue.url or embedded, _redis_password(settings.queue)
    if url is None:
        raise FailedPrecondition("queue.url is not set: start the run by `honed up`, or set HONED_QUEUE__URL")
    return RedisLink(url, password=password if settings.queue.url else None, retry=retry, **options)


def redis_url(settings: RunSettings) -> str:
    """The URL of Redis with its password as it is now, for a command that connects once.

    Raises:
        FailedPrecondition: no URL is set: the launcher, or whoever deploys, sets it.
        ValueError: the password file cannot be read.
    """
    url, password = settings.queue.url, _redis_password(settings.queue)
    if url is None:
        raise FailedPrecondition("queue.url is not set: start the run by `honed up`, or set HONED_QUEUE__URL")
    if password is None:
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:{quote(password(), safe='')}@{host}"))


def _redis_password(queue: QueueSettings) -> Callable[[], str] | None:
    """What returns the password as it is now; None if there is none beside the URL."""
    file, fixed = queue.password_file, queue.password
    if file is None:
        return fixed.get_secret_value if fixed else None

    def read() -> str:
        try:
            password = file.read_text().strip()
        except OSError as error:
            raise ValueError(f"queue.password_file {file} cannot be read: {error.strerror}") from error
        if not password:
            raise ValueError(f"queue.password_file {file} is empty")
        return password

    return FromFiles([file], read).get


def leads_nowhere(host: str, port: int) -> bool:
    """Tells whether others cannot call what listens there: on every interface, or on a port that nobody knows before."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host.strip("[]")).is_unspecified:
            return True
    return port == 0


def check_addresses(settings: RunSettings) -> None:
    """Asserts that each service can be found by the run file, which local launchers see to by themselves.

    Raises:
        FailedPrecondition: a service has no address; names it.
    """
    for name in SERVICES:
        section: ServerSettings = getattr(settings, name)
        if section.address is None and leads_nowhere(section.host, section.port):
            raise FailedPrecondition(
                f"{name}.address is not set, and {section.target} leads nowhere: services that run elsewhere "
                f"(conductor.launcher: {settings.conductor.launcher}) are found by the addresses in the run file"
            )


def consumer_name(service: str) -> str:
    """A name for this process in a consumer group, used by no other."""
    return f"{service}-{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"


def _token_table(settings: RunSettings) -> TokenTable:
    if settings.security.tokens is None:
        ensure_local_tokens(settings.tokens_directory)
    return TokenTable.load(settings.tokens_directory / "table.json")
