"""From the settings and the environment to this process' traces, and its record of connections: whether, where to, as who."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from honed import __version__
from honed.config import RunSettings
from honed.kit import connections
from honed.kit.address import check_collector
from honed.kit.errors import FailedPrecondition
from honed.kit.from_files import FromFiles
from honed.settings import TelemetrySettings

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HEADER: Final = re.compile(r"([0-9a-z_.-]+):[ \t]*([\x20-\x7e]*\S)\s*", re.IGNORECASE)


@contextmanager
def traced(settings: RunSettings, service: str, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Does the block with traces, if there is a collector for them; what is left goes out at its end.

    The file of headers is read again when it is replaced. From here on the process also records its connections, if it is to
    (`kit.connections`).

    Args:
        settings: the run's.
        service: what this process is.
        environment: OpenTelemetry's own variables, where the settings say nothing.

    Raises:
        FailedPrecondition: the packages for it are not installed; names the extra.
        ValueError: the environment's collector or the file of headers cannot be used.
    """
    connections.record(service, environment)
    endpoint = collector_endpoint(settings.telemetry, environment)
    if endpoint is None:
        yield
        return
    file = settings.telemetry.headers_file
    headers = None if file is None else FromFiles([file], lambda: read_headers(file)).get
    try:
        from honed.kit.otlp import Collector, exporting
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"traces are to go to {endpoint}, and the package {error.name} is not installed: install honed[tracing], or unset "
            "telemetry.otlp_endpoint"
        ) from error
    resource = {
        "service.namespace": "honed",
        "service.name": f"honed-{service}",
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
        "service.version": __version__,
        "honed.run": settings.run,
    }
    with exporting(Collector(endpoint, headers), settings.telemetry.sample_ratio, resource):
        yield


def collector_endpoint(settings: TelemetrySettings, environment: Mapping[str, str]) -> str | None:
    """Where traces go; None for nowhere.

    The settings come before OpenTelemetry's variables. Those may stand in an environment for other programs: what is none of
    ours there (`OTEL_TRACES_EXPORTER` other than otlp) is let be, and what would fail is refused, not guessed.

    Raises:
        ValueError: the environment's collector cannot be used; names the variable.
    """
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if settings.otlp_endpoint is not None:
        return settings.otlp_endpoint
    name = _first_set(ENDPOINTS, environment)
    if name is None or (environment.get("OTEL_TRACES_EXPORTER") or "otlp") != "otlp":
        return None
    protocol = _first_set(PROTOCOLS, environment)
    if protocol is not None and environment[protocol] != "grpc":
        raise ValueError(
            f"{name} is set with {protocol}={environment[protocol]}, and honed speaks OTLP over gRPC alone: set "
            "telemetry.otlp_endpoint, or OTEL_TRACES_EXPORTER=none for no traces"
        )
    try:
        check_collector(environment[name])
    except ValueError as error:
        raise ValueError(f"{name} {error}; telemetry.otlp_endpoint comes before it") from None
    return environment[name]


def _first_set(names: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """The first that is set, the specific before the general; by OpenTelemetry's specification empty is unset."""
    return next((name for name in names if environment.get(name)), None)


def read_headers(path: Path) -> tuple[tuple[str, str], ...]:
    """Headers of a file, one `NAME: VALUE` a line; empty lines and lines with `#` are left out.

    Raises:
        ValueError: the file cannot be read, or a line is none; names it by its number, since it may hold a secret.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"telemetry.headers_file {path} cannot be read: {reason}") from error
    headers = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _HEADER.fullmatch(line)
        if match is None:
            raise ValueError(f"telemetry.headers_file {path}, line {number}: is not of the form NAME: VALUE")
        headers.append((match[1].lower(), match[2]))
    return tuple(headers)
