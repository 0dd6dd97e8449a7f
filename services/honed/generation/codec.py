"""Between the engine's values and the messages of the contract."""

from __future__ import annotations

from honed.artifacts.version import VersionId
from honed.generation.requests import Chunk, FinishReason
from honed.v1 import common_pb2, generation_pb2, reward_pb2

_FINISH = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: common_pb2.FINISH_REASON_ABORTED,
}


class Codec:
    """Writes messages of one run."""

    def __init__(self, run: str) -> None:
        """`run` names the run in the versions that go out."""
        self.run = run
        self._last_version = (VersionId(0, 0), common_pb2.PolicyVersion(run=run))

    def version(self, version: VersionId) -> common_pb2.PolicyVersion:
        """A version; the last one asked for is kept, because nearly every span has it."""
        if self._last_version[0] != version:
            message = common_pb2.PolicyVersion(run=self.run, fence=version.fence, step=version.step)
            self._last_version = (version, message)
        return self._last_version[1]

    def sample(self, index: int, chunk: Chunk) -> generation_pb2.Sample:
        """A response, or a part of it, for an application."""
        return generation_pb2.Sample(
            index=index,
            text=chunk.text,
            token_ids=chunk.token_ids,
            logprobs=chunk.logprobs,
            version_spans=self._spans(chunk),
            finish_reason=_FINISH[chunk.finish_reason],
        )

    def scored_sample(self, index: int, chunk: Chunk, result: reward_pb2.ScoreResult) -> generation_pb2.Sample:
        """A whole response, with what it is worth."""
        sample = self.sample(index, chunk)
        sample.reward = result.reward
        sample.scores.extend(result.scores)
        return sample

    def rollout(self, task: common_pb2.PromptTask, index: int, chunk: Chunk, trace_parent: str = "") -> common_pb2.Rollout:
        """A whole response to a training prompt; `trace_parent` is of the span that it was sampled in."""
        return common_pb2.Rollout(
            rollout_id=f"{task.group_id}/{index}",
            group_id=task.group_id,
            run=task.run,
            prompt_token_ids=task.prompt_token_ids,
            response_token_ids=chunk.token_ids,
            logprobs=chunk.logprobs,
            version_spans=self._spans(chunk),
            sampling=task.sampling,
            finish_reason=_FINISH[chunk.finish_reason],
            trace_parent=trace_parent,
            reference=task.reference,
        )

    def _spans(self, chunk: Chunk) -> list[common_pb2.VersionSpan]:
        return [
            common_pb2.VersionSpan(version=self.version(span.version), start=span.start, end=span.end) for span in chunk.spans
        ]
