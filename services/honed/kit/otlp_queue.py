"""The way of spans to a collector, by OTLP over gRPC.

A collector that is away costs its spans and nothing else: spans wait in a bounded queue, a thread exports them, and the log has
one warning when that fails and one line when it works again. Spans that are lost are counted, and the first that finds the
queue full is warned of.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import opentelemetry.exporter.otlp.proto.grpc.exporter as _exporter_module
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_QUEUE_SIZE
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from honed.kit import metrics

logger = logging.getLogger(__name__)

# The exporter draws the jitter of its retries from `random`, whose draws belong to whoever has seeded it: a collector that is
# away would change what a learner or a scorer draws next. The module gets a generator of its own under that name.
vars(_exporter_module)["random"] = random.Random()


class SpanSender(OTLPSpanExporter):
    """The exporter of OTLP over gRPC with headers that are asked for before each export.

    The SDK's keeps those of its start, and a token is replaced while it runs.
    """

    def __init__(self, headers: Callable[[], tuple[tuple[str, str], ...]] | None, **settings: Any) -> None:
        super().__init__(**settings)
        self._headers_now = headers

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See `SpanExporter`."""
        if self._headers_now is not None:
            self._headers = self._headers_now()
        return super().export(spans)


class BoundedQueue(SpanProcessor):
    """The SDK's queue, with a count of the spans that find it full: the SDK drops those without telling the process."""

    def __init__(self, exporter: OTLPSpanExporter, endpoint: str) -> None:
        self._endpoint = endpoint
        self._size = _queue_size()
        self._lock = threading.Lock()
        self._waiting = 0
        self._warned = self._stopped = False
        self._queue = BatchSpanProcessor(_Watched(exporter, endpoint, self._taken), max_queue_size=self._size)

    def on_end(self, span: ReadableSpan) -> None:
        """See `SpanProcessor`; never waits."""
        with self._lock:
            fits = self._waiting < self._size
            self._waiting += fits
            warn, self._warned = not fits and not self._warned, self._warned or not fits
        if fits and not self._stopped:  # after the stop the SDK would log a line for each
            self._queue.on_end(span)
        else:
            metrics.SPANS_LOST.labels("queue_full").inc()
        if warn:
            about = {"endpoint": self._endpoint, "queue": self._size, "counted_in": "honed_spans_lost_total"}
            logger.warning("spans come faster than the collector takes them; what finds the queue full is lost", extra=about)

    def _taken(self, spans: int) -> None:
        with self._lock:
            self._waiting -= spans

    def shutdown(self) -> None:
        """See `SpanProcessor`."""
        self._stopped = True
        self._queue.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """See `SpanProcessor`."""
        return self._queue.force_flush(timeout_millis)


def _queue_size() -> int:
    """OTEL_BSP_MAX_QUEUE_SIZE, and the standard's 2048 where that is no number above 0."""
    size = os.environ.get(OTEL_BSP_MAX_QUEUE_SIZE, "").strip()
    return int(size) if size.isdecimal() and int(size) else 2048


class _Watched(SpanExporter):
    """Says once that exporting fails, and once that it works again; the exporter itself would say so every few seconds."""

    def __init__(self, exporter: OTLPSpanExporter, endpoint: str, taken: Callable[[int], None]) -> None:
        self._exporter, self._endpoint, self._taken = exporter, endpoint, taken
        self._away = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._taken(len(spans))
        with _ours.held_back() as said:
            result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed:
            metrics.SPANS_LOST.labels("export_failed").inc(len(spans))
        if failed and not self._away:
            about = {"endpoint": self._endpoint, "reason": said[-1] if said else ""}
            logger.warning("spans cannot be exported, and are lost until they can", extra=about)
        elif self._away and not failed:
            logger.info("spans are exported again", extra={"endpoint": self._endpoint})
        self._away = failed
        return result

    def shutdown(self) -> None:
        shut(self._exporter)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def shut(exporter: OTLPSpanExporter) -> None:
    """Breaks off what waits for the collector. It may be called again."""
    with _ours.held_back():  # the second time it warns
        exporter.shutdown()


class _OwnMessages(logging.Filter):
    """Holds back what the exporter's module logs about our exports. Whoever else exports in this process keeps its own."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: ContextVar[list[str] | None] = ContextVar("honed_exporter_messages", default=None)

    @contextmanager
    def held_back(self) -> Iterator[list[str]]:
        """Collects in place of logging what the block, in this thread, has to say."""
        messages: list[str] = []
        before = self._messages.set(messages)
        try:
            yield messages
        finally:
            self._messages.reset(before)

    def filter(self, record: logging.LogRecord) -> bool:
        messages = self._messages.get()
        if messages is not None:
            messages.append(record.getMessage())
        return messages is None


_ours: Final = _OwnMessages()
# Before the module's own filter of repetitions, which would hide a reason that another exporter gave a moment ago.
_exporter_module.logger.filters.insert(0, _ours)
