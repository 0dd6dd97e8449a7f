"""A stream of deltas that remembers them, so that feedback on what was streamed carries its tokens and versions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from honed._client.values import Delta, Origin, Sample, delta
from honed.v1 import generation_pb2


class SampleStream(Iterator[Delta]):
    """Deltas of all samples of a request, as they come. Leaving the `with` block early aborts the sampling in the engine."""

    def __init__(self, responses: Iterator[generation_pb2.StreamGenerateResponse], origin: Origin) -> None:
        """Wraps what the service streams."""
        self._responses, self._origin = responses, origin
        self._wholes: dict[int, generation_pb2.Sample] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Delta:
        """The next delta.

        Raises:
            RequestError: the call failed.
        """
        message = next(self._responses).delta
        whole = self._wholes.setdefault(message.index, generation_pb2.Sample(index=message.index))
        whole.text += message.text
        whole.token_ids.extend(message.token_ids)
        whole.logprobs.extend(message.logprobs)
        whole.finish_reason = message.finish_reason
        if message.HasField("reward"):
            whole.reward = message.reward
            whole.scores.extend(message.scores)
        for span in message.version_spans:
            if whole.version_spans and whole.version_spans[-1].version == span.version:
                whole.version_spans[-1].end = span.end
            else:
                whole.version_spans.append(span)
        return delta(message)

    @property
    def samples(self) -> list[Sample]:
        """What has come so far: whole responses once the stream has ended. By index; with `best_of`, the best first."""
        wholes = list(self._wholes.values())
        if not any(whole.HasField("reward") for whole in wholes):
            wholes.sort(key=lambda whole: whole.index)
        return [self._origin.sample(whole, self._origin.token_ids) for whole in wholes]

    def close(self) -> None:
        """Cancels what has not ended."""
        close = getattr(self._responses, "close", None)
        if close is not None:
            close()
