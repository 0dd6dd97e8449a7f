"""Prometheus metrics that every service has: calls by method and code, their latency, and how many are in flight."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from honed.kit.address import cannot_listen

CALLS = Counter("honed_grpc_calls_total", "Calls served, by method and status code.", ["method", "code"])
LATENCY = Histogram(
    "honed_grpc_call_seconds",
    "Time from the arrival of a call to its end.",
    ["method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
IN_FLIGHT = Gauge("honed_grpc_calls_in_flight", "Calls being served.", ["method"])
SPANS_LOST = Counter("honed_spans_lost_total", "Spans that no collector got, by reason.", ["reason"])


class Outcome:
    """The status code that a call will be counted under."""

    code = "OK"


class MethodMetrics:
    """The metrics of one method; looking labels up at each call would cost more than counting."""

    def __init__(self, method: str) -> None:
        """`method` is the full name."""
        self._method = method
        self._in_flight = IN_FLIGHT.labels(method)
        self._latency = LATENCY.labels(method)
        self._ok = CALLS.labels(method, "OK")

    @contextmanager
    def observe(self) -> Iterator[Outcome]:
        """Counts and times one call; set `code` on what it yields when the call fails."""
        outcome = Outcome()
        started = time.monotonic()
        self._in_flight.inc()
        try:
            yield outcome
        finally:
            self._in_flight.dec()
            (self._ok if outcome.code == "OK" else CALLS.labels(self._method, outcome.code)).inc()
            self._latency.observe(time.monotonic() - started)


def expose(host: str, port: int) -> None:
    """Serves `/metrics` by HTTP in a background thread.

    Raises:
        OSError: the port is taken; names it.
    """
    try:
        start_http_server(port, addr=host)
    except OSError as error:
        raise cannot_listen(host, port, "metrics") from error
