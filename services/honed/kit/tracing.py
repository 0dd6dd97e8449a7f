"""Spans: what a service did for whom, and for how long. Off, they cost a comparison and carry the context on.

A trace begins at a head (a prompt's admission, a call that comes without a trace), where the sampling is decided once.
Everything else is a span below one that is there, or none. Spans hold ids, counts, versions and codes: never a text of a
prompt, a response or an error, which may be a person's. `honed.kit.otlp` records and exports them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, Literal, Protocol

from honed.kit import trace_context
from honed.kit.trace_context import TraceContext

Kind = Literal["internal", "server", "client", "producer", "consumer"]
Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value]


class Span:
    """A piece of work of a trace, or of none. This one is not recorded: it only hands the context on."""

    recorded: bool = False

    def __init__(self, context: TraceContext | None) -> None:
        """`context` is what work inside of it, and what it hands on, belongs to."""
        self.context = context

    @property
    def traceparent(self) -> str:
        """For a message or a call that continues the trace; empty without one."""
        return "" if self.context is None else self.context.traceparent

    def set(self, attributes: Attributes) -> None:
        """Adds attributes. Where they cost something to make, ask `recorded` first."""

    def fail(self, reason: BaseException | str) -> None:
        """Marks it as failed, by the type of an error or by a short word."""

    def end(self) -> None:
        """Ends it. Idempotent."""


class Recorder(Protocol):
    """What makes spans that are recorded."""

    def begin(
        self, name: str, parent: TraceContext | None, kind: Kind, attributes: Attributes, links: Sequence[TraceContext]
    ) -> Span:
        """A span; without a parent it begins a trace, and decides whether that is sampled."""

    def stop(self) -> None:
        """Hands on what has ended, within a bounded time."""


NOTHING: Final = Span(None)
_recorder: Recorder | None = None


def record_with(recorder: Recorder | None) -> None:
    """Records spans of this process by `recorder` from now on; None stops it."""
    global _recorder
    _recorder = recorder


def stop() -> None:
    """Stops recording, and hands on what has ended, within a bounded time: for a process that ends without its `finally`s."""
    recorder = _recorder
    record_with(None)
    if recorder is not None:
        recorder.stop()


def is_on() -> bool:
    """Whether this process records spans."""
    return _recorder is not None


def begin(
    name: str,
    parent: TraceContext | None,
    *,
    head: bool = False,
    kind: Kind = "internal",
    attributes: Attributes | None = None,
    links: Sequence[TraceContext] = (),
) -> Span:
    """A span that whoever asked for it ends.

    Args:
        name: What is done.
        parent: Where it belongs.
        head: Without a parent it begins a trace. Otherwise it is `NOTHING` then.
        kind: As OpenTelemetry has it.
        attributes: What is known of it already.
        links: Other spans that it has to do with. A trace that begins with some is sampled if one of theirs is.
    """
    if parent is None:
        return NOTHING if _recorder is None or not head else _recorder.begin(name, None, kind, attributes or {}, links)
    if _recorder is None or not parent.sampled:
        return Span(parent)
    return _recorder.begin(name, parent, kind, attributes or {}, links)


@contextmanager
def within(span: Span) -> Iterator[Span]:
    """Does the block as the work of `span`, and ends it then; an error or a cancellation that leaves the block is its own.

    Not around a `yield` of an asynchronous generator: what follows it may run in another context.
    """
    if span.context is None:
        yield span
        return
    before = trace_context.current.set(span.context)
    try:
        yield span
    except BaseException as error:
        _fail(span, error)
        raise
    finally:
        trace_context.current.reset(before)
        span.end()


def _fail(span: Span, error: BaseException) -> None:
    span.fail("cancelled" if isinstance(error, asyncio.CancelledError) else error)


@contextmanager
def ending(spans: Sequence[Span]) -> Iterator[Sequence[Span]]:
    """Ends all of them with the block, which is the work of each; an error or a cancellation that leaves it is each one's."""
    try:
        yield spans
    except BaseException as error:
        for span in spans:
            _fail(span, error)
        raise
    finally:
        for span in spans:
            span.end()


@contextmanager
def span(name: str, *, head: bool = False, attributes: Attributes | None = None) -> Iterator[Span]:
    """Does the block as a span below the current one. Without one: as a trace of its own if it is a `head`, else as no span."""
    with within(begin(name, trace_context.current.get(), head=head, attributes=attributes)) as begun:
        yield begun
