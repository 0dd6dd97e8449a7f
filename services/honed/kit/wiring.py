"""From the settings tree to the kit's own arguments: how each service listens, calls the others, and reaches Redis."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from urllib.parse import quote, urlsplit, urlunsplit

import grpc

from honed.config import RunSettings, ServerSettings
from honed.kit.channel import connect
from honed.kit.errors import FailedPrecondition
from honed.kit.server import ServerOptions
from honed.kit.tls import TlsFiles
from honed.kit.tokens import TokenTable, ensure_local_tokens, read_token


def server_options(settings: RunSettings, section: ServerSettings, open_ended: Iterable[str] = ()) -> ServerOptions:
    """How a service of this run listens.

    Raises:
        ValueError: the token table or a TLS file cannot be read.
    """
    return ServerOptions(
        host=section.host,
        health_port=section.health_port,
        metrics_port=section.metrics_port,
        tokens=_token_table(settings) if settings.security.authentication else None,
        tls=tls_files(settings),
        reflection=section.reflection,
        deadline_s=section.deadline_s,
        open_ended=frozenset(open_ended),
        drain_s=section.drain_s,
    )


def internal_channel(settings: RunSettings, target: str) -> grpc.aio.Channel:
    """A channel to another service of the run, with this run's internal token.

    Raises:
        ValueError: the token or a TLS file cannot be read.
    """
    return connect(target, internal_token(settings), tls_files(settings))


def internal_token(settings: RunSettings) -> str | None:
    """The token by which services call each other; None when authentication is off."""
    return read_token(settings.tokens_directory / "internal.token") if settings.security.authentication else None


def tls_files(settings: RunSettings) -> TlsFiles | None:
    """The run's certificate files, None for plain text."""
    tls = settings.security.tls
    return None if tls is None else TlsFiles(tls.authority, tls.certificate, tls.key)


def redis_url(settings: RunSettings) -> str:
    """The URL of Redis, with its password.

    Raises:
        FailedPrecondition: no URL is set: the launcher, or whoever deploys, sets it.
        ValueError: the password file cannot be read.
    """
    queue = settings.queue
    if queue.url is None:
        raise FailedPrecondition("queue.url is not set: start the run by `honed up`, or set HONED_QUEUE__URL")
    password = queue.password.get_secret_value() if queue.password else None
    if queue.password_file is not None:
        try:
            password = queue.password_file.read_text().strip()
        except OSError as error:
            raise ValueError(f"queue.password_file {queue.password_file} cannot be read: {error.strerror}") from error
    if not password:
        return queue.url
    parts = urlsplit(queue.url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:{quote(password, safe='')}@{host}"))


def consumer_name(service: str) -> str:
    """A name for this process in a consumer group, used by no other."""
    return f"{service}-{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"


def _token_table(settings: RunSettings) -> TokenTable:
    if settings.security.tokens is None:
        ensure_local_tokens(settings.tokens_directory)
    return TokenTable.load(settings.tokens_directory / "table.json")
