"""The trace of a prompt along the streams: it begins with its admission, and each stage continues what the entry carries."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from honed.kit import trace_context, tracing
from honed.kit.trace_context import TraceContext
from honed.kit.tracing import Attributes, Span
from honed.queue.keys import PROMPTS
from honed.queue.messages import Delivery, Message
from honed.v1 import common_pb2

_LISTED: Final = 16
"""Ids in one attribute at most."""


@contextmanager
def admitted(prompts: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Begins the trace of each prompt, and yields the prompts to admit: they carry it.

    One that is not sampled carries that too, so that no later stage decides anew.
    """
    if not tracing.is_on():
        yield prompts
        return
    spans, carrying = [], []
    for prompt in prompts:
        task = common_pb2.PromptTask.FromString(prompt.body)
        facts: Attributes = {"honed.prompt": prompt.id, "honed.source": task.source, "honed.samples": task.samples}
        span = tracing.begin("admit", None, head=True, kind="producer", attributes=facts)
        task.trace_parent = span.traceparent
        spans.append(span)
        carrying.append(Message(prompt.id, task.SerializeToString(), span.traceparent))
    with tracing.ending(spans):
        yield carrying


def context_of(delivery: Delivery) -> TraceContext | None:
    """The trace that an entry belongs to."""
    return trace_context.parse(delivery.message.traceparent) if delivery.message.traceparent else None


def work_span(
    name: str, delivery: Delivery, attributes: Attributes | None = None, *, links: Sequence[TraceContext] = ()
) -> Span:
    """The span of one stage's work on an entry; it is `tracing.NOTHING` if the entry belongs to no trace."""
    span = tracing.begin(name, context_of(delivery), kind="consumer", links=links)
    if span.recorded:
        waited_s = time.time() - int(delivery.entry.partition("-")[0]) / 1000  # an entry's id is the time of its arrival
        span.set(
            {
                "messaging.system": "redis_streams",
                "messaging.destination.name": delivery.stage,
                "messaging.message.id": delivery.entry,
                "honed.deliveries": delivery.count,
                "honed.queue_wait_s": max(0.0, waited_s),
                _name_of(delivery, "honed."): delivery.message.id,
                **(attributes or {}),
            }
        )
    return span


def about(delivery: Delivery) -> dict[str, object]:
    """What a log line about an entry says of it: entry, prompt or rollout, and trace."""
    context = context_of(delivery)
    trace = {} if context is None else {"trace_id": context.trace_id, "span_id": context.span_id}
    return {"entry": delivery.entry, _name_of(delivery): delivery.message.id, **trace}


def listed(values: Sequence[str]) -> list[str]:
    """Values for one attribute, each once, the first few."""
    return list(dict.fromkeys(values))[:_LISTED]


def _name_of(delivery: Delivery, prefix: str = "") -> str:
    return prefix + ("prompt" if delivery.stage == PROMPTS else "rollout")
