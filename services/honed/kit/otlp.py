"""Records spans by OpenTelemetry's SDK and exports them by OTLP over gRPC. Imported only where that is asked for.

A stop waits for `FLUSH_S` at most; `otlp_queue` is the way to the collector.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
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

from honed.kit import connections, tracing
from honed.kit.otlp_queue import BoundedQueue, SpanSender, shut
from honed.kit.trace_context import TraceContext
from honed.kit.tracing import Attributes, Kind, Span

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
    exporter = SpanSender(collector.headers, endpoint=collector.endpoint, insecure=plain, timeout=_EXPORT_S)
    recorder = _SdkRecorder(exporter, collector.endpoint, sample_ratio, resource)
    tracing.record_with(recorder)
    try:
        yield
    finally:
        tracing.stop()


class _SdkRecorder:
    """Makes spans by the SDK."""

    def __init__(self, exporter: SpanSender, endpoint: str, ratio: float, resource: Mapping[str, str]) -> None:
        self._exporter = exporter
        self._provider = TracerProvider(
            sampler=ParentBased(_Heads(ratio)),
            resource=Resource.create(dict(resource)),
            shutdown_on_exit=False,  # at the exit of the interpreter nobody bounds it
            id_generator=_SystemIds(),
        )
        self._provider.add_span_processor(BoundedQueue(exporter, endpoint))
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
        shut(self._exporter)  # breaks off what still waits for the collector; after a whole flush it does nothing


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


def _sdk_context(context: TraceContext) -> SpanContext:
    return SpanContext(
        int(context.trace_id, 16),
        int(context.span_id, 16),
        is_remote=context.remote,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT),
    )
