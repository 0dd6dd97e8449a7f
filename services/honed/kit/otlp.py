"""Records spans by OpenTelemetry's SDK and exports them by OTLP over gRPC. Imported only where that is asked for.

A collector that is away costs its spans and nothing else: spans wait in a bounded queue, a thread exports them, the log has
one warning when that fails and one line when it works again, and a stop waits for `FLUSH_S` at most. Spans that are lost are
counted, and the first that finds the queue full is warned of.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import opentelemetry.exporter.otlp.proto.grpc.exporter as _exporter_module
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_QUEUE_SIZE
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.trace import Span as SdkSpan

from honed.kit import connections, metrics, tracing
from honed.kit.trace_context import TraceContext
from honed.kit.tracing import Attributes, Kind, Span

logger = logging.getLogger(__name__)

# The exporter draws the jitter of its retries from `random`, whose draws belong to whoever has seeded it: a collector that is
# away would change what a learner or a scorer draws next. The module gets a generator of its own under that name.
vars(_exporter_module)["random"] = random.Random()

FLUSH_S: Final = 2.0
"""How long a stop waits for the collector."""
_EXPORT_S: Final = 10.0
_KINDS: Final = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
    "producer": SpanKind.PRODUCER,
    "consumer": SpanKind.CONSUMER,
}


@dataclass(frozen=True)
class Collector:
    """Where spans go.

    Attributes:
        endpoint: `http://host:port` for plain text, `https://host:port` for TLS.
        headers: Asked before each export for what to send with it; None takes OTEL_EXPORTER_OTLP_HEADERS.
    """

    endpoint: str
    headers: Callable[[], tuple[tuple[str, str], ...]] | None = None


@contextmanager
def exporting(collector: Collector, sample_ratio: float, resource: Mapping[str, str]) -> Iterator[None]:
    """Records what the block does, and exports it.

    Args:
        collector: Where to.
        sample_ratio: Of the traces that begin here, how many are recorded, 0 to 1.
        resource: Says which process this is.
    """
    plain = collector.endpoint.startswith("http://")
    connections.calling(collector.endpoint.partition("://")[2].rstrip("/"))
    exporter = _Exporter(collector.headers, endpoint=collector.endpoint, insecure=plain, timeout=_EXPORT_S)
    recorder = _SdkRecorder(exporter, collector.endpoint, sample_ratio, resource)
    tracing.record_with(recorder)
    try:
        yield
    finally:
        tracing.stop()


class _SdkRecorder:
    """Makes spans by the SDK."""

    def __init__(self, exporter: OTLPSpanExporter, endpoint: str, ratio: float, resource: Mapping[str, str]) -> None:
        self._exporter = exporter
        self._provider = TracerProvider(
            sampler=ParentBased(_Heads(ratio)),
            resource=Resource.create(dict(resource)),
            shutdown_on_exit=False,  # at the exit of the interpreter nobody bounds it
            id_generator=_SystemIds(),
        )
        self._provider.add_span_processor(_Bounded(exporter, endpoint))
        self._tracer = self._provider.get_tracer("honed")

    def begin(
        self, name: str, parent: TraceContext | None, kind: Kind, attributes: Attributes, links: Sequence[TraceContext]
    ) -> Span:
        """See `tracing.Recorder`."""
        above = Context()  # never the SDK's own current one: ours is `trace_context.current`
        if parent is not None:
            above = set_span_in_context(NonRecordingSpan(_sdk_context(parent)), above)
        made = self._tracer.start_span(
            name,
            context=above,
            kind=_KINDS[kind],
            attributes=dict(attributes),
            links=[Link(_sdk_context(link)) for link in links],
        )
        found = made.get_span_context()
        context = TraceContext(f"{found.trace_id:032x}", f"{found.span_id:016x}", found.trace_flags.sampled)
        return _RecordedSpan(context, made) if made.is_recording() else Span(context)

    def stop(self) -> None:
        """Exports what is left, within `FLUSH_S`."""
        flush = threading.Thread(target=self._provider.shutdown, name="flush-spans", daemon=True)
        flush.start()
        flush.join(FLUSH_S)
        _shut(self._exporter)  # breaks off what still waits for the collector; after a whole flush it does nothing


class _RecordedSpan(Span):
    """A span of the SDK."""

    recorded = True

    def __init__(self, context: TraceContext, made: SdkSpan) -> None:
        super().__init__(context)
        self._made = made

    def set(self, attributes: Attributes) -> None:
        if self._made.is_recording():  # the SDK would log a line for each attribute of an ended one
            self._made.set_attributes(dict(attributes))

    def fail(self, reason: BaseException | str) -> None:
        if not self._made.is_recording():
            return
        self._made.set_attribute("error.type", reason if isinstance(reason, str) else type(reason).__name__)
        self._made.set_status(Status(StatusCode.ERROR))

    def end(self) -> None:
        if self._made.is_recording():
            self._made.end()


class _Heads(Sampler):
    """Decides for a span that begins a trace: with links as those were decided, so that no link leads nowhere."""

    def __init__(self, ratio: float) -> None:
        self._by_ratio = TraceIdRatioBased(ratio)

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: Any = None,
    ) -> SamplingResult:
        if links:
            sampled = any(link.context.trace_flags.sampled for link in links)
            return SamplingResult(Decision.RECORD_AND_SAMPLE if sampled else Decision.DROP, attributes)
        return self._by_ratio.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return f"honed heads, {self._by_ratio.get_description()}"


class _SystemIds(IdGenerator):
    """Ids from the system's randomness: the SDK's own come from `random`, whose draws belong to whoever has seeded it."""

    _random = random.SystemRandom()

    def generate_span_id(self) -> int:
        return self._random.randrange(1, 1 << 64)

    def generate_trace_id(self) -> int:
        return self._random.randrange(1, 1 << 128)

    def is_trace_id_random(self) -> bool:
        return True


class _Exporter(OTLPSpanExporter):
    """Sends the headers that hold now: the SDK's exporter keeps those of its start, and a token is replaced while it runs."""

    def __init__(self, headers: Callable[[], tuple[tuple[str, str], ...]] | None, **settings: Any) -> None:
        super().__init__(**settings)
        self._headers_now = headers

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._headers_now is not None:
            self._headers = self._headers_now()
        return super().export(spans)


class _Bounded(SpanProcessor):
    """The SDK's queue, with a count of the spans that find it full: the SDK drops those without telling the process."""

    def __init__(self, exporter: OTLPSpanExporter, endpoint: str) -> None:
        self._endpoint = endpoint
        self._size = _queue_size()
        self._lock = threading.Lock()
        self._waiting = 0
        self._warned = self._stopped = False
        self._queue = BatchSpanProcessor(_Watched(exporter, endpoint, self._taken), max_queue_size=self._size)

    def on_end(self, span: ReadableSpan) -> None:
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
        self._stopped = True
        self._queue.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
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
        _shut(self._exporter)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _shut(exporter: OTLPSpanExporter) -> None:
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


def _sdk_context(context: TraceContext) -> SpanContext:
    return SpanContext(
        int(context.trace_id, 16),
        int(context.span_id, 16),
        is_remote=context.remote,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT),
    )
