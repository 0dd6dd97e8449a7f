"""An update in the traces: its own trace, linked to those of its rollouts, and a span of it in each of theirs.

One update trains many rollouts, and a rollout's trace should show its whole way. So each rollout's trace ends with a span
`train` as long as the update took, which links to the span `update`; that has links back, and checkpoint, publishing and push
below it. `LINKED` bounds both. An update is sampled if one of its rollouts is; where none carries a trace, the ratio decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from honed.kit import trace_context, tracing
from honed.kit.tracing import Span
from honed.learner.sources.source import InHand
from honed.queue.messages import Delivery
from honed.queue.spans import context_of, work_span

LINKED: Final = 128
"""Rollouts of one update that are shown in traces at most; OpenTelemetry keeps as many links of a span."""


@contextmanager
def update_span(held: Sequence[InHand], update: int) -> Iterator[Span]:
    """Does the block as the work on one batch, from the update to the beginning of its push.

    Args:
        held: The batch.
        update: The number of the update that is made of it.
    """
    if not tracing.is_on():
        yield tracing.NOTHING
        return
    contexts = [context for delivery in _deliveries(held) if (context := context_of(delivery)) is not None]
    links = [context for context in contexts if context.sampled][:LINKED] or contexts[:1]  # one says that none is sampled
    facts = {"honed.update": update, "honed.rollouts": len(held)}
    with tracing.within(tracing.begin("update", None, head=True, attributes=facts, links=links)) as span:
        yield span


@contextmanager
def train_spans(held: Sequence[InHand], step: int) -> Iterator[None]:
    """Shows the block, an update of the weights of `step`, in the trace of each rollout of it."""
    update = trace_context.current.get()
    if not tracing.is_on() or update is None:
        yield
        return
    spans = [
        work_span(
            "train",
            delivery,
            {"honed.update": step + 1, "honed.staleness": each.staleness(step)},
            links=[update],
        )
        for each, delivery in _sampled(held)
    ]
    with tracing.ending(spans):
        yield


def _deliveries(held: Sequence[InHand]) -> list[Delivery]:
    return [each.delivery for each in held if each.delivery is not None]


def _sampled(held: Sequence[InHand]) -> list[tuple[InHand, Delivery]]:
    """The first rollouts whose traces are recorded."""
    found: list[tuple[InHand, Delivery]] = []
    for each in held:
        context = context_of(each.delivery) if each.delivery is not None else None
        if each.delivery is not None and context is not None and context.sampled:
            found.append((each, each.delivery))
        if len(found) == LINKED:
            break
    return found
