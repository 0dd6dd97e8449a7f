"""What vLLM gives out for a request, as chunks of the engine port."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from honed.artifacts.version import VersionId
from honed.generation.requests import Chunk, FinishReason, Span
from honed.generation.vllm.errors import translated
from honed.kit.errors import Unavailable

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORTED}


class Sampled:
    """A request in vLLM. `next` gives its parts; the last one has a finish reason."""

    def __init__(self, llm: Any, queue: Any, want_logprobs: bool, on_end: Callable[[], None]) -> None:
        """`queue` is vLLM's collector of the request's outputs; `on_end` is called once the engine has ended the request."""
        self._llm = llm
        self._queue = queue
        self._want_logprobs = want_logprobs
        self._count = 0
        # vLLM reports spans with the last output only; a stream needs them with each. The request's state has them all along.
        self._starts: list[tuple[str, int]] = llm.output_processor.request_states[queue.request_id].weight_version_starts
        _watch_end(queue, on_end)

    async def next(self) -> Chunk:
        """The next part. Raises Unavailable if the engine died."""
        with translated():
            output = (await self._queue.get()).outputs[0]
        start, self._count = self._count, self._count + len(output.token_ids)
        return Chunk(
            token_ids=tuple(output.token_ids),
            logprobs=_sampled_logprobs(output.logprobs) if self._want_logprobs else (),
            spans=_spans(self._starts, start, self._count),
            text=output.text,
            finish_reason=_finish_reason(output.finish_reason),
        )

    async def abort(self) -> None:
        """Frees the engine of the request; nothing happens if it has ended."""
        if not self._llm.errored:
            await self._llm.abort(self._queue.request_id, internal=True)


def _watch_end(queue: Any, on_end: Callable[[], None]) -> None:
    """Calls `on_end` when vLLM puts a request's last output, or its error, into the collector `queue`."""
    put = queue.put

    def seen(output: Any) -> None:
        if isinstance(output, Exception) or output.finished:
            del queue.put  # the collector's own again: nothing refers to itself
            on_end()
        put(output)

    queue.put = seen


def _finish_reason(reason: str | None) -> FinishReason | None:
    if reason is None:
        return None
    if reason not in _FINISH:
        raise Unavailable(f"vLLM ended the request with {reason!r}; the same request may succeed when sent again")
    return _FINISH[reason]


def _sampled_logprobs(flat: Any) -> tuple[float, ...]:
    """The first entry of each position is the sampled token's."""
    if not flat:
        return ()
    values = flat.logprobs
    return tuple(values) if len(values) == len(flat) else tuple(values[start] for start in flat.start_indices)


def _spans(starts: Sequence[tuple[str, int]], start: int, end: int) -> tuple[Span, ...]:
    """The part of the spans that lies in `start..end`; `starts` gives each label with the index of its first token."""
    spans = []
    ends = [first for _, first in starts[1:]] + [end]
    for (label, first), last in zip(starts, ends, strict=True):
        if max(first, start) < min(last, end):
            spans.append(Span(VersionId.parse(label), max(first, start), min(last, end)))
    return tuple(spans)
