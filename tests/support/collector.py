"""A real collector of OTLP over gRPC in the test's process, and spans as a test reads them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class Seen:
    """A span that has arrived. `place` is its trace and itself, as links name it."""

    service: str
    name: str
    kind: str
    place: tuple[str, str]
    parent: str
    links: tuple[tuple[str, str], ...]
    attributes: dict[str, Any]
    failed: bool
    start_ns: int
    end_ns: int

    @property
    def trace(self) -> str:
        return self.place[0]

    @property
    def id(self) -> str:
        return self.place[1]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Seen] = []
        self.metadata: dict[str, str] = {}
        self.endpoint = ""
        self._arrived = threading.Condition()

    def Export(self, request: Any, context: Any) -> Any:
        with self._arrived:
            self.metadata = {row.key: row.value for row in context.invocation_metadata()}
            for group in request.resource_spans:
                service = _attributes(group.resource.attributes)["service.name"]
                self.spans += [_seen(service, span) for scope in group.scope_spans for span in scope.spans]
            self._arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Seen]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> Seen:
        [found] = self.named(name)
        return found

    def wait_for(self, claim: Callable[[Collector], bool], timeout_s: float = 20.0) -> None:
        """Blocks until what has arrived fulfils a claim."""
        end = time.monotonic() + timeout_s
        with self._arrived:
            while not claim(self):
                assert self._arrived.wait(end - time.monotonic()), [span.name for span in self.spans]


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """Serves a collector."""
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()


def _seen(service: str, span: Any) -> Seen:
    return Seen(
        service=service,
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        place=(span.trace_id.hex(), span.span_id.hex()),
        parent=span.parent_span_id.hex(),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        attributes=_attributes(span.attributes),
        failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
    )


def _attributes(rows: Any) -> dict[str, Any]:
    return {row.key: _value(row.value) for row in rows}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)
