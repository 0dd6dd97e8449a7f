"""The W3C trace context: read as OpenTelemetry reads it, and shown in log lines."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from tests.support.run import environment

from honed.kit import trace_context, tracing
from honed.kit.log import JsonFormatter
from honed.kit.trace_context import TraceContext, parse

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEX = "0123456789abcdef"


@pytest.mark.parametrize(
    "text",
    [
        "", "00", f"00-{TRACE}-{SPAN}", f"00-{TRACE}-{SPAN}-01-more", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-1", f"00-{TRACE}-{SPAN}-01\n",
        f"0-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-0١",
    ],
)  # fmt: skip
def test_what_is_no_trace_context_is_none(text: str) -> None:
    assert parse(text) is None


@given(
    version=st.sampled_from(["00", "01", "cc", "fe", "ff"]),
    trace=st.one_of(st.text(HEX, min_size=32, max_size=32), st.just("0" * 32), st.text(HEX, max_size=34)),
    span=st.one_of(st.text(HEX, min_size=16, max_size=16), st.just("0" * 16)),
    flags=st.text(HEX, min_size=2, max_size=2),
    rest=st.sampled_from(["", "-x"]),
)
def test_it_is_read_as_opentelemetry_reads_it(version: str, trace: str, span: str, flags: str, rest: str) -> None:
    text = f"{version}-{trace}-{span}-{flags}{rest}"
    theirs = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": text})).get_span_context()
    ours = parse(text)
    assert (ours is not None) == theirs.is_valid
    if ours is not None:
        found = (int(ours.trace_id, 16), int(ours.span_id, 16), ours.sampled)
        assert found == (theirs.trace_id, theirs.span_id, theirs.trace_flags.sampled)
        assert parse(ours.traceparent) == ours


def line_of(**extra: object) -> dict[str, object]:
    record = logging.makeLogRecord({"msg": "a line", **extra})
    found: dict[str, object] = json.loads(JsonFormatter("test").format(record))
    return found


def test_log_lines_carry_the_trace_of_their_work_whether_or_not_it_is_exported() -> None:
    assert "trace_id" not in line_of()
    assert not tracing.is_on()
    with tracing.within(tracing.begin("work", TraceContext(TRACE, SPAN, sampled=False))):
        line = line_of()
    assert (line["trace_id"], line["span_id"]) == (TRACE, SPAN)
    assert "trace_id" not in line_of()


def test_what_is_passed_to_a_line_about_an_entry_comes_before_the_current_trace() -> None:
    with tracing.within(tracing.begin("work", TraceContext(TRACE, SPAN, sampled=True))):
        assert line_of(trace_id="a" * 32)["trace_id"] == "a" * 32


def test_off_a_head_begins_nothing_and_a_context_is_carried_on_as_it_came() -> None:
    assert tracing.begin("admit", None, head=True) is tracing.NOTHING
    came = parse(f"00-{TRACE}-{SPAN}-01")
    span = tracing.begin("score", came)
    assert not span.recorded
    assert span.traceparent == f"00-{TRACE}-{SPAN}-01"
    with tracing.span("fetch", head=True) as inner:
        assert inner is tracing.NOTHING
        assert trace_context.current.get() is None


def test_off_no_service_imports_an_exporter() -> None:
    parts = ("kit.server", "kit.channel", "telemetry", "queue.spans", "conductor.main", "preference.main")
    code = f"import sys, {', '.join(f'honed.{part}' for part in parts)}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=environment()
    )
    imported = done.stdout.split()
    assert "honed.kit.tracing" in imported
    assert not [name for name in imported if name.startswith(("opentelemetry.exporter", "honed.kit.otlp"))]
