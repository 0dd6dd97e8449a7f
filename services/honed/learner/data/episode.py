"""One training sample: a scored rollout, checked once at the door.

An `Episode` that exists is sound: lengths agree, every token has one version, log-probabilities are finite, ids are in the
vocabulary, the padding token was not sampled, there is at least one action token, and sampling had full support.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from honed.artifacts.version import VersionId
from honed.kit.errors import InvalidArgument
from honed.v1 import common_pb2

FinishReason = Literal["", "stop", "length", "aborted"]
_FINISHED: Final[dict[int, FinishReason]] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_ABORTED: "aborted",
}


class EmitsPadding(InvalidArgument):
    """The policy sampled the padding token. One such rollout is left out; where most are, the policy is broken."""


@dataclass(frozen=True)
class TokenSpan:
    """Response tokens `start` to `end` (exclusive), all sampled by one policy version."""

    version: VersionId
    start: int
    end: int


@dataclass(frozen=True)
class Vocabulary:
    """What ids a response may hold."""

    size: int
    """Ids run from 0 to `size` - 1."""
    pad_token_id: int | None = None
    """The id that no response may hold; None when the tokenizer's padding token is also a real one."""
    end_token_ids: frozenset[int] = frozenset()
    """Ids that end a response; empty when they are not known."""


@dataclass(frozen=True)
class Episode:
    """A prompt, its sampled response, and what the response was worth."""

    rollout_id: str
    entry_id: str
    """Id of the entry in the stream `scored`, to acknowledge it by."""
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The sampler's log-probability of each response token at `temperature`, nats."""
    spans: tuple[TokenSpan, ...]
    reward: float
    temperature: float = 1.0
    missing: bool = False
    """The truncation token never came: `reward` is the price of that and is not normalised."""
    group_id: str = ""
    """The prompt's turn: responses to one prompt share it."""
    finish_reason: FinishReason = ""
    """Why it ended: `stop` (by itself), `length` (at its limit), `aborted`; empty where that is not known."""
    scores: tuple[tuple[str, float], ...] = ()
    """What each scorer said, by its name, before its weight."""
    token_rewards: tuple[float, ...] = ()
    """What scorers gave for each response token, times their weights. Its sum is a part of `reward`; empty where none did."""

    @property
    def cut(self) -> bool:
        """Whether it reached the limit of its length and did not end by itself."""
        return self.finish_reason == "length"

    @property
    def oldest(self) -> VersionId:
        """The oldest version that sampled any of its tokens: what staleness is counted from."""
        return min((span.version for span in self.spans), key=lambda version: version.step)

    @classmethod
    def from_scored(
        cls, entry_id: str, scored: common_pb2.ScoredRollout, vocabulary: Vocabulary, *, max_tokens: int | None = None
    ) -> Episode:
        """Converts an entry of the stream `scored`.

        Args:
            entry_id: the entry's id in the stream.
            scored: the message.
            vocabulary: of the policy.
            max_tokens: the most tokens, prompt and response together; None for no limit.

        Raises:
            InvalidArgument: naming the field that is wrong. Such an entry can never train and belongs with the dead letters.
        """
        rollout = scored.rollout
        temperature = rollout.sampling.temperature if rollout.sampling.HasField("temperature") else 1.0
        episode = cls(
            rollout_id=rollout.rollout_id,
            entry_id=entry_id,
            prompt=tuple(rollout.prompt_token_ids),
            response=tuple(rollout.response_token_ids),
            logprobs=tuple(rollout.logprobs),
            spans=tuple(TokenSpan(VersionId(s.version.fence, s.version.step), s.start, s.end) for s in rollout.version_spans),
            reward=scored.reward,
            temperature=temperature,
            missing=scored.missing,
            group_id=rollout.group_id,
            finish_reason=_FINISHED.get(rollout.finish_reason, ""),
            scores=tuple((score.scorer, score.value) for score in scored.scores),
            token_rewards=_token_rewards(scored),
        )
        _check_sampling(rollout.sampling)
        _check(episode, vocabulary, max_tokens)
        _check_end(rollout, vocabulary)
        return episode


def _token_rewards(scored: common_pb2.ScoredRollout) -> tuple[float, ...]:
    """The sum over scorers that reward each token. The price of a missing truncation token stands for all of them.

    Raises:
        InvalidArgument: They are not one for each response token, or not finite; names the scorer.
    """
    length = len(scored.rollout.response_token_ids)
    total = [0.0] * length
    dense = [(index, score) for index, score in enumerate(scored.scores) if score.token_values]
    for index, score in dense:
        field = f"scores[{index}].token_values"
        if len(score.token_values) != length:
            raise InvalidArgument(
                field, f"scorer {score.scorer!r} gave {len(score.token_values)} rewards for a response of {length} tokens"
            )
        for at, value in enumerate(score.token_values):
            total[at] += score.weight * value
            if not math.isfinite(total[at]):
                raise InvalidArgument(f"{field}[{at}]", f"scorer {score.scorer!r} gave {value}, or too much with its weight")
    return tuple(total) if dense and not scored.missing else ()


def _check_sampling(sampling: common_pb2.SamplingParams) -> None:
    if sampling.HasField("top_p") and sampling.top_p < 1.0:
        raise InvalidArgument(
            "rollout.sampling.top_p", f"{sampling.top_p:g} cuts the support and biases the ratios; sample training data with 1"
        )
    if sampling.top_k:
        raise InvalidArgument(
            "rollout.sampling.top_k", f"{sampling.top_k} cuts the support and biases the ratios; sample training data with 0"
        )


def _check(episode: Episode, vocabulary: Vocabulary, max_tokens: int | None) -> None:
    if not episode.rollout_id:
        raise InvalidArgument("rollout.rollout_id", "is empty; without it nothing proves that the rollout trains once")
    if not (math.isfinite(episode.temperature) and episode.temperature > 0):
        raise InvalidArgument(
            "rollout.sampling.temperature", f"must be positive to train on, got {episode.temperature:g} (0 is greedy)"
        )
    if not math.isfinite(episode.reward):
        raise InvalidArgument("reward", f"must be finite, got {episode.reward}")
    for at, (scorer, value) in enumerate(episode.scores):
        if not math.isfinite(value):
            raise InvalidArgument(f"scores[{at}].value", f"scorer {scorer!r} gave {value}, which is not finite")
    _check_ids("rollout.prompt_token_ids", episode.prompt, vocabulary.size)
    _check_ids("rollout.response_token_ids", episode.response, vocabulary.size)
    if vocabulary.pad_token_id is not None and vocabulary.pad_token_id in episode.response:
        at = episode.response.index(vocabulary.pad_token_id)
        raise EmitsPadding(
            f"rollout.response_token_ids[{at}]",
            f"is the padding token {vocabulary.pad_token_id}, which cannot train. If the base model samples it, set "
            "pad_token_id in its generation_config.json or config.json to a token that ends a response, and start another run "
            "from it; if only trained versions do, lower learner.learning_rate",
        )
    length = len(episode.response)
    if max_tokens is not None and len(episode.prompt) + length > max_tokens:
        raise InvalidArgument(
            "rollout.response_token_ids", f"prompt and response have {len(episode.prompt) + length} tokens, over {max_tokens}"
        )
    if len(episode.logprobs) != length:
        raise InvalidArgument("rollout.logprobs", f"has {len(episode.logprobs)} entries for {length} response tokens")
    for at, logprob in enumerate(episode.logprobs):
        # A little above zero is rounding in the sampler, not an error.
        if not (math.isfinite(logprob) and logprob <= 1e-3):
            raise InvalidArgument(f"rollout.logprobs[{at}]", f"{logprob} is not the logarithm of a probability")
    _check_spans(episode.spans, length)


def _check_end(rollout: common_pb2.Rollout, vocabulary: Vocabulary) -> None:
    """A response that stopped by itself holds the token that stopped it: ending is an action, and it is trained."""
    sampling = rollout.sampling
    ends = vocabulary.end_token_ids | set(sampling.stop_token_ids)
    if rollout.finish_reason != common_pb2.FINISH_REASON_STOP or sampling.stop or not ends:
        return
    last = rollout.response_token_ids[-1]
    if last not in ends:
        raise InvalidArgument(
            "rollout.response_token_ids",
            f"the response stopped, and its last token {last} is none that ends one; the sampler must record the token too",
        )


def _check_ids(field: str, ids: tuple[int, ...], size: int) -> None:
    if not ids:
        raise InvalidArgument(field, "is empty; at least one token is needed")
    if max(ids) >= size or min(ids) < 0:
        at = next(i for i, token in enumerate(ids) if not 0 <= token < size)
        raise InvalidArgument(f"{field}[{at}]", f"{ids[at]} is not in the vocabulary of {size}; is it another tokenizer's?")


def _check_spans(spans: tuple[TokenSpan, ...], length: int) -> None:
    covered = 0
    for at, span in enumerate(spans):
        if span.start != covered or span.end <= span.start:
            raise InvalidArgument(
                f"rollout.version_spans[{at}]",
                f"covers {span.start} to {span.end}, must start at {covered} and hold at least one token",
            )
        covered = span.end
    if covered != length:
        raise InvalidArgument("rollout.version_spans", f"cover {covered} of {length} response tokens")
