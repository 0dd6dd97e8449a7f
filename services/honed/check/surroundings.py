"""Checks the services around a run: Redis, database, store of versions, addresses, traces, tracking."""

from __future__ import annotations

import importlib.util
import os
import socket
import uuid
from pathlib import Path
from typing import Final

from honed.artifacts.files import open_backend
from honed.check.findings import Report, existing
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, HonedError
from honed.telemetry import collector_endpoint, read_headers
from honed.tracking.start import check_tracking

_REDIS_VERSION: Final = (6, 2)


def check_surroundings(settings: RunSettings, report: Report) -> None:
    """Checks what a run talks to. Waits a few seconds for what does not answer."""
    if settings.conductor.services_elsewhere:
        _check_addresses(settings, report)
    _check_redis(settings, report)
    _check_store(settings, report)
    _check_database(settings, report)
    _check_telemetry(settings, report)
    _check_tracking(settings, report)


def _check_telemetry(settings: RunSettings, report: Report) -> None:
    try:
        endpoint = collector_endpoint(settings.telemetry, os.environ)
        if endpoint is not None and settings.telemetry.headers_file is not None:
            read_headers(settings.telemetry.headers_file)
    except ValueError as error:
        report.error("telemetry", str(error))
        return
    if endpoint is not None and importlib.util.find_spec("opentelemetry.exporter.otlp.proto.grpc") is None:
        report.error("telemetry", f"traces are to go to {endpoint}, and what exports them is missing: install honed[tracing]")


def _check_tracking(settings: RunSettings, report: Report) -> None:
    try:
        check_tracking(settings)
    except (FailedPrecondition, ValueError) as error:
        report.error("tracking", str(error))


def _check_addresses(settings: RunSettings, report: Report) -> None:
    from honed.runtime import check_addresses

    try:
        check_addresses(settings)
    except FailedPrecondition as error:
        report.error("conductor.launcher", str(error))


def _check_redis(settings: RunSettings, report: Report) -> None:
    from honed.queue.embedded import redis_server_binary
    from honed.runtime import redis_url

    if settings.queue.url is None:
        if settings.conductor.services_elsewhere:
            said = f"is not set, and conductor.launcher is {settings.conductor.launcher}"
            report.error("queue.url", f"{said}: name the Redis that all services share")
            return
        try:
            redis_server_binary()
        except FailedPrecondition as error:
            report.error("queue.url", str(error))
        return
    import redis

    from honed.queue.connection import without_password

    shown = without_password(settings.queue.url)
    try:
        with redis.Redis.from_url(redis_url(settings), socket_timeout=5.0, socket_connect_timeout=5.0) as client:
            version = str(client.info("server")["redis_version"])
    except (redis.RedisError, OSError, ValueError) as error:
        report.error("queue.url", f"Redis at {shown} does not answer ({error}): start it, or correct the URL or the password")
        return
    if tuple(int(part) for part in version.split(".")[:2]) < _REDIS_VERSION:
        report.error("queue.url", f"Redis at {shown} is {version}; 6.2 or newer is needed")
    report.figures["redis_version"] = version


def _check_store(settings: RunSettings, report: Report) -> None:
    url = settings.policy.url
    if url is None:
        return  # in the run's directory, which is checked
    try:
        backend = open_backend(url, 10.0)
        probe = backend.join(f".honed-check-{uuid.uuid4().hex}")
        backend.write(probe, b"honed check")
        backend.remove(probe)
    except (HonedError, OSError) as error:
        report.error("policy.url", f"{url} cannot be written ({error}): correct the URL, or the rights of whoever runs this")


def _check_database(settings: RunSettings, report: Report) -> None:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    where = "preference.database_url"
    try:
        url = make_url(settings.database_url)
    except ArgumentError:
        report.error(where, "is no SQLAlchemy URL: write sqlite+aiosqlite:///FILE or postgresql+asyncpg://USER@HOST/NAME")
        return
    if url.get_backend_name() == "sqlite":
        if url.database and not os.access(existing(Path(url.database)), os.W_OK):
            report.error(where, f"{url.database} cannot be written: choose another file")
        return
    try:
        socket.create_connection((url.host or "localhost", url.port or 5432), timeout=5.0).close()
    except OSError as error:
        report.error(where, f"the database server {url.host}:{url.port or 5432} does not answer ({error}): start it")
