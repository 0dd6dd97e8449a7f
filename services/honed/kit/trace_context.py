"""Which trace a piece of work belongs to, as W3C Trace Context has it: on calls, on stream entries and in log lines.

Needs no package. A service that exports nothing carries the context of others on, and its log lines have their ids.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

HEADER: Final = "traceparent"
_FORM: Final = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_SAMPLED: Final = 1


@dataclass(frozen=True)
class TraceContext:
    """A place in a trace.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits: the span that work from here on belongs under.
        sampled: Whether the trace is recorded. Decided where it began; everybody follows.
        remote: Whether it came from another process.
    """

    trace_id: str
    span_id: str
    sampled: bool
    remote: bool = field(default=False, compare=False)

    @property
    def traceparent(self) -> str:
        """The header's value."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


current: ContextVar[TraceContext | None] = ContextVar("honed_trace", default=None)
"""Of the work that is being done; None outside of any trace."""


def parse(traceparent: str) -> TraceContext | None:
    """Reads a header's value; None if it is none, as the recommendation has it: who cannot read it goes on without.

    `tracestate` is not carried: a stream entry has no field for it.
    """
    found = _FORM.fullmatch(traceparent)
    if found is None or (found[1] == "00" and found[5]):  # only later versions may have more at the end
        return None
    return TraceContext(found[2], found[3], bool(int(found[4], 16) & _SAMPLED), remote=True)
