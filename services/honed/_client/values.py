"""What the client hands out: samples, deltas and scores, as frozen values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, cast

from honed.v1 import common_pb2, generation_pb2, reward_pb2

FinishReason = Literal["", "stop", "length", "aborted"]
_FINISH: dict[int, FinishReason] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_ABORTED: "aborted",
}


class ChatMessage(TypedDict):
    """One message of a conversation: who speaks (`system`, `user`, `assistant`, as the model's template has it), and what."""

    role: str
    content: str


Tokens = str | Sequence[int]
"""Text, or token ids of the policy's vocabulary."""

PromptContent = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids, or a conversation that the policy's chat template renders."""


class SamplingOptions(TypedDict, total=False):
    """How to draw tokens; what is left out is the server's default.

    Attributes:
        max_tokens: the most tokens to sample.
        temperature: divides the logits; 0 is greedy.
        top_p: keeps the smallest set of tokens whose probability reaches this.
        top_k: keeps the k most likely tokens; 0 keeps all.
        seed: makes sampling repeatable; sample i uses seed + i.
        stop: texts that end a response; not part of its text.
        stop_token_ids: token ids that end a response.
        fixed_length: sample exactly `max_tokens` tokens, past any end-of-sequence token.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    fixed_length: bool


@dataclass(frozen=True, slots=True)
class Version:
    """A version of the policy. `str()` gives its label, `fence.step`."""

    run: str
    fence: int
    step: int

    def __str__(self) -> str:
        """The label."""
        return f"{self.fence}.{self.step}"


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens from `start` up to `end`, not included, were sampled by `version`."""

    version: Version
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One response.

    Attributes:
        text: decoded.
        token_ids: as sampled.
        logprobs: natural logarithm of each token's probability; empty unless asked for.
        versions: which version sampled which tokens; ordered, without gaps.
        finish_reason: why it ended.
        index: which of the n samples; with `best_of`, which of the candidates.
        prompt: what was continued; empty if it was given as token ids.
        prompt_token_ids: the prompt as the model saw it; empty if a stream did not tell.
        sampling: how it was drawn.
        reward: what the response is worth, the weighted sum of its scores; None without `best_of`.
        scores: what each scorer said; empty without `best_of`.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[Span, ...]
    finish_reason: FinishReason
    index: int = 0
    prompt: str = field(default="", repr=False)
    prompt_token_ids: tuple[int, ...] = field(default=(), repr=False)
    sampling: common_pb2.SamplingParams | None = field(default=None, repr=False, compare=False)
    reward: float | None = None
    scores: tuple[ScorerValue, ...] = ()

    @property
    def version(self) -> Version | None:
        """The version that sampled the whole of it; None if there were several, or no tokens."""
        versions = {span.version for span in self.versions}
        return versions.pop() if len(versions) == 1 else None


@dataclass(frozen=True, slots=True)
class Delta:
    """What was sampled of response `index` since its last delta. Spans count from the start of the response."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[Span, ...]
    finish_reason: FinishReason


Scorable = Sample | str | tuple[Tokens, Tokens]
"""A sample; or a text that stands alone; or prompt and response."""


@dataclass(frozen=True, slots=True)
class ScorerValue:
    """What one scorer said: its value before the weight, and how many tokens it had to leave out.

    An ensemble also says the value of each of its members, and their population standard deviation; a scorer that rewards each
    token one value for each token of the response, whose sum is `value`.
    """

    scorer: str
    version: str
    value: float
    weight: float
    truncated_tokens: int
    members: tuple[float, ...] = ()
    deviation: float = 0.0
    token_values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """A response's reward, the weighted sum of its scores."""

    reward: float
    scores: tuple[ScorerValue, ...]


@dataclass(frozen=True)
class Origin:
    """What all samples of one request share."""

    prompt: PromptContent
    sampling: common_pb2.SamplingParams

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The prompt's token ids, where the caller gave them."""
        if isinstance(self.prompt, str):
            return ()
        return tuple(part for part in self.prompt if isinstance(part, int))

    def sample(self, message: generation_pb2.Sample, prompt_token_ids: Iterable[int]) -> Sample:
        """One response as a value."""
        sampling = common_pb2.SamplingParams()
        sampling.CopyFrom(self.sampling)
        if sampling.HasField("seed"):
            sampling.seed += message.index
        return Sample(
            text=message.text,
            token_ids=tuple(message.token_ids),
            logprobs=tuple(message.logprobs),
            versions=_spans(message.version_spans),
            finish_reason=_FINISH.get(message.finish_reason, ""),
            index=message.index,
            prompt=self.prompt if isinstance(self.prompt, str) else "",
            prompt_token_ids=tuple(prompt_token_ids),
            sampling=sampling,
            reward=message.reward if message.HasField("reward") else None,
            scores=_scores(message.scores),
        )


def delta(message: generation_pb2.Sample) -> Delta:
    """A part of a response as a value."""
    return Delta(
        message.index,
        message.text,
        tuple(message.token_ids),
        tuple(message.logprobs),
        _spans(message.version_spans),
        _FINISH.get(message.finish_reason, ""),
    )


def scored(message: reward_pb2.ScoreResult) -> Scored:
    """A result as a value."""
    return Scored(message.reward, _scores(message.scores))


def sampling_params(options: SamplingOptions) -> common_pb2.SamplingParams:
    """The contract's message.

    Raises:
        TypeError: an option is unknown or of the wrong type.
        ValueError: a number does not fit.
    """
    unknown = sorted(set(options) - set(SamplingOptions.__annotations__))
    if unknown:
        raise TypeError(f"no sampling option {unknown[0]!r}; there are " + ", ".join(SamplingOptions.__annotations__))
    given = {name: value for name, value in options.items() if value is not None}
    stop = given.get("stop")
    if isinstance(stop, str):
        given["stop"] = (stop,)
    return common_pb2.SamplingParams(**given)  # type: ignore[arg-type]  # protobuf checks each


def prompt_message(prompt: PromptContent, reference: str = "") -> generation_pb2.Prompt:
    """The contract's message.

    Raises:
        TypeError: it is neither text, nor token ids, nor messages with `role` and `content`.
    """
    if isinstance(prompt, str):
        return generation_pb2.Prompt(text=prompt, reference=reference)
    if any(isinstance(part, Mapping) for part in prompt):
        messages = generation_pb2.ChatMessages(messages=[_chat_message(part) for part in prompt])
        return generation_pb2.Prompt(messages=messages, reference=reference)
    ids = generation_pb2.TokenIds(ids=cast("Sequence[int]", prompt))
    return generation_pb2.Prompt(token_ids=ids, reference=reference)


def best_of_message(candidates: int | None, scorer: str) -> generation_pb2.BestOf | None:
    """The contract's message; None where a plain sample is asked for.

    Raises:
        ValueError: `scorer` is given without candidates, and would do nothing.
    """
    if candidates is not None:
        return generation_pb2.BestOf(candidates=candidates, scorer=scorer)
    if scorer:
        raise ValueError(f"scorer {scorer!r} chooses among candidates: say how many by `best_of`")
    return None


def _chat_message(part: Any) -> generation_pb2.ChatMessage:
    if not isinstance(part, Mapping) or set(part) != {"role", "content"}:
        raise TypeError(f"a message of a conversation has `role` and `content` and nothing else, not {part!r}")
    return generation_pb2.ChatMessage(role=part["role"], content=part["content"])


def score_item(item: Scorable, reference: str = "") -> reward_pb2.ScoreItem:
    """The contract's message; `reference` is what scorers compare the response with."""
    prompt: PromptContent | None
    response: str | Sequence[int]
    if isinstance(item, Sample):
        # Token ids where they are known on both sides: decoding and tokenising again need not give the same tokens.
        prompt, response = item.prompt_token_ids or item.prompt, item.token_ids or item.text
    elif isinstance(item, str):
        prompt, response = None, item
    else:
        prompt, response = item
    message = reward_pb2.ScoreItem(prompt=prompt_message(prompt) if prompt is not None and len(prompt) else None)
    if isinstance(response, str):
        message.text = response
    else:
        message.token_ids.ids.extend(response)
    if reference:
        if message.prompt.WhichOneof("content") is None:
            message.prompt.text = ""
        message.prompt.reference = reference
    return message


def _spans(messages: Iterable[common_pb2.VersionSpan]) -> tuple[Span, ...]:
    return tuple(Span(Version(m.version.run, m.version.fence, m.version.step), m.start, m.end) for m in messages)


def _scores(messages: Iterable[common_pb2.Score]) -> tuple[ScorerValue, ...]:
    return tuple(
        ScorerValue(
            s.scorer,
            s.scorer_version,
            s.value,
            s.weight,
            s.truncated_tokens,
            tuple(s.members),
            s.deviation,
            tuple(s.token_values),
        )
        for s in messages
    )
