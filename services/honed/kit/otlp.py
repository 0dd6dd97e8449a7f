"""Records spans by OpenTelemetry's SDK and exports them by OTLP over gRPC. Imported only where that is asked for.

A collector that is away costs its spans and nothing else: spans wait in a bounded queue, a thread exports them, the log has
one warning when that fails and one line when it works again, and a stop waits for `FLUSH_S` at most.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import opentelemetry.exporter.otlp.proto.grpc.exporter as _exporter_module
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
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

from honed.kit import tracing
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
    exporter = _Exporter(collector.headers, endpoint=collector.endpoint, insecure=plain, timeout=_EXPORT_S)
    recorder = _SdkRecorder(exporter, collector.endpoint, sample_ratio, resource)
    tracing.record_with(recorder)
    try:
        yield
    finally:
        tracing.record_with(None)
        recorder.stop()


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
        self._provider.add_span_processor(BatchSpanProcessor(_Watched(exporter, endpoint)))
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
        self._exporter.shutdown()  # breaks off what still waits for the collector; after a whole flush it does nothing


class _RecordedSpan(Span):
    """A span of the SDK."""

    recorded = True

    def __init__(self, context: TraceContext, made: SdkSpan) -> None:
        super().__init__(context)
        self._made = made

    def set(self, attributes: Attributes) -> None:
        self._made.set_attributes(dict(attributes))

    def fail(self, reason: BaseException | str) -> None:
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


class _Watched(SpanExporter):
    """Says once that exporting fails, and once that it works again; the exporter itself would say so every few seconds."""

    def __init__(self, exporter: OTLPSpanExporter, endpoint: str) -> None:
        self._exporter, self._endpoint = exporter, endpoint
        self._away = False
        self._said = _LastMessage()
        for name in ("opentelemetry.exporter.otlp.proto.grpc", "opentelemetry.sdk"):
            chatty = logging.getLogger(name)
            chatty.handlers, chatty.propagate = [self._said], False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS and not self._away:
            about = {"endpoint": self._endpoint, "reason": self._said.message}
            logger.warning("spans cannot be exported, and are lost until they can", extra=about)
        elif result is SpanExportResult.SUCCESS and self._away:
            logger.info("spans are exported again", extra={"endpoint": self._endpoint})
        self._away = result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _LastMessage(logging.Handler):
    """Keeps the last message in place of writing any."""

    message = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.message = record.getMessage()


def _sdk_context(context: TraceContext) -> SpanContext:
    return SpanContext(
        int(context.trace_id, 16),
        int(context.span_id, 16),
        is_remote=context.remote,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT),
    )
