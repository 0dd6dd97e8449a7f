"""The port of a scorer: a batch of responses in, one number for each out.

A scorer is synchronous and runs in the one compute thread of the service. It may be called again for single samples of a batch
that it failed on, so a call must not change what later calls answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal, Protocol, Self

import grpc

from honed.kit.errors import DeadlineExceeded, HonedError, InvalidArgument, Overloaded, Unavailable
from honed.models.chat import ChatMessage
from honed.models.text_stream import TextStream
from honed.models.tokenizer import ChatTokenizer, render_chat

Kind = Literal["reward_model", "function", "ensemble", "remote"]

LONGEST_S: Final = 110.0
"""What all scorers that give a batch up by themselves may take together: less than `BatchSettings.compute_timeout_s`."""

_PASSING: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)


class ScorerFailed(HonedError):
    """A scorer could not score a sample, or gave an answer that is no score."""

    def __init__(self, scorer: str, version: str, reason: str, sample: int | None = None) -> None:
        """`sample` is the index in the batch or call, None when the whole of it is concerned."""
        where = "" if sample is None else f" on sample {sample}"
        super().__init__(f"scorer '{scorer}' ({version}) failed{where}: {reason}")
        self.scorer = scorer
        self.version = version
        self.reason = reason
        self.sample = sample

    def at(self, sample: int | None) -> Self:
        """The same error, with the index that the sample has for somebody else."""
        return type(self)(self.scorer, self.version, self.reason, sample)


class BadSample(ScorerFailed):
    """The sample is at fault, not the scorer: another try gives the same."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotAScore(ScorerFailed):
    """The scorer answered, and its answer is no score: not finite, or of the wrong shape. Its code is wrong; no outage is."""


def is_outage(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that a scorer is out of order for now, whatever it is asked."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (Unavailable, DeadlineExceeded, Overloaded, TimeoutError, ConnectionError)):
            return True
        if isinstance(cause, grpc.RpcError) and getattr(cause, "code", lambda: None)() in _PASSING:
            return True
        cause = cause.__cause__
    return False


class ScoringTokenizer(ChatTokenizer, Protocol):
    """A tokenizer, as far as scoring needs it. Not for two threads at once."""

    @property
    def digest(self) -> str:
        """The sha256 of its `tokenizer.json`: two tokenizers of one digest give the same ids for the same text."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens that it puts in front of a text, such as the beginning of text; often none."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, without special tokens."""


@dataclass(frozen=True)
class ScorerInput:
    """One prompt with one response, each as token ids of the policy, as text, or as both.

    A side without tokens came as text; a side without text is decoded when a scorer asks for it.

    Attributes:
        tokenizer: The policy's tokenizer.
        prompt_tokens: The prompt's token ids; None if it came as text or there is none.
        prompt: The prompt's text, if it came as text.
        response_tokens: The response's token ids, None if it came as text.
        response: The response's text, if it came as text.
        messages: The prompt as a conversation, for the policy's chat template; None if it came otherwise.
        reference: What the response is compared with; empty if there is nothing.
    """

    tokenizer: ScoringTokenizer
    prompt_tokens: tuple[int, ...] | None = None
    prompt: str | None = None
    response_tokens: tuple[int, ...] | None = None
    response: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    reference: str = ""

    @cached_property
    def prompt_text(self) -> str:
        """The prompt as text; empty if there is none."""
        if self.prompt is not None:
            return self.prompt
        return self.tokenizer.decode(self.prompt_ids) if self.prompt_ids else ""

    @cached_property
    def response_text(self) -> str:
        """The response as it continues the prompt.

        Some tokenizers drop the space in front of the first token that they decode. So where the prompt has tokens, both are
        decoded together and the prompt's text is taken off.
        """
        if self.response is not None:
            return self.response
        if not self.response_tokens:
            return ""
        if self.prompt is None and self.prompt_ids:
            whole = self.tokenizer.decode(self.prompt_ids + self.response_tokens)
            if whole.startswith(self.prompt_text):
                return whole[len(self.prompt_text) :]
        return self.tokenizer.decode(self.response_tokens)

    @cached_property
    def response_ids(self) -> tuple[int, ...]:
        """The response in the policy's tokens."""
        if self.response_tokens is not None:
            return self.response_tokens
        return tuple(self.tokenizer.encode(self.response or "", special_tokens=False))

    @cached_property
    def response_pieces(self) -> tuple[str, ...]:
        """The text of each of the response's tokens; joined they are the response.

        A token that ends in the middle of a character is empty, and the one that ends the character has all of it. So is
        a special token.
        """
        stream = TextStream(self.tokenizer.decode, self.prompt_ids, ())
        pieces = []
        for token in self.response_ids:
            stream.push(token)
            pieces.append(stream.take())
        stream.finish()
        if pieces:
            pieces[-1] += stream.take()
        return tuple(pieces)

    @cached_property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt in the policy's tokens, as generation encodes it; empty if there is none.

        Raises:
            InvalidArgument: The policy's chat template refuses the messages, or there is none.
        """
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        if self.messages is not None:
            return tuple(render_chat(self.tokenizer, self.messages, field="prompt.messages"))
        return tuple(self.tokenizer.encode(self.prompt, special_tokens=True)) if self.prompt else ()

    @property
    def cost(self) -> int:
        """About how many tokens the pair has, without tokenising: what a dynamic batch counts."""
        said = sum(len(message.content) for message in self.messages or ()) // 3
        return max(1, said + _tokens(self.prompt_tokens, self.prompt) + _tokens(self.response_tokens, self.response))

    def cut(self, end: int) -> ScorerInput:
        """The same prompt with the first `end` tokens of the response."""
        return replace(self, response_tokens=self.response_ids[:end], response=None)


@dataclass(frozen=True, slots=True)
class ScorerOutput:
    """What a scorer says of one sample.

    Attributes:
        value: The score. Whoever adds the scores up checks that it is finite.
        truncated_tokens: How many tokens the scorer had to leave out.
        members: Of an ensemble, the value of each member.
        deviation: Of an ensemble, the population standard deviation of `members`.
        token_values: Of a scorer that rewards each token, one for each of the response, whose sum is `value`; else None.
        version: Which version of the scorer said it, where only the answer tells; empty for the scorer's own.
    """

    value: float
    truncated_tokens: int = 0
    members: tuple[float, ...] = ()
    deviation: float = 0.0
    version: str = ""
    token_values: tuple[float, ...] | None = None


class Scorer(Protocol):
    """One term of the reward, in one version."""

    @property
    def name(self) -> str:
        """Its name in the settings."""

    @property
    def version(self) -> str:
        """What changes whenever it may answer differently; `honed.v1.Score` says what it is for each kind."""

    @property
    def kind(self) -> Kind:
        """What it is."""

    @property
    def max_tokens(self) -> int:
        """The most tokens of prompt and response together; 0 when there is no limit."""

    @property
    def longest_s(self) -> float:
        """Seconds after which it gives a batch up by itself; 0 where it computes until it is done."""

    def score(self, batch: Sequence[ScorerInput]) -> Sequence[ScorerOutput]:
        """Scores each sample, in the order of the batch.

        Raises:
            ScorerFailed: It could not; names the sample if it knows it.
        """


def check_longest(scorers: Iterable[tuple[str, float]]) -> None:
    """Asserts that a batch which every scorer gives up ends before the service takes a scorer for hung, and ends.

    Args:
        scorers: Name and `longest_s` of each; one computes after the other.

    Raises:
        InvalidArgument: Their times together are too long.
    """
    bounded = [(name, seconds) for name, seconds in scorers if seconds]
    if (together := sum(seconds for _, seconds in bounded)) > LONGEST_S:
        each = ", ".join(f"{name} {seconds:g} s" for name, seconds in bounded)
        raise InvalidArgument(
            "reward.scorers",
            f"one scores after the other, and together they may take {together:g} s ({each}), where {LONGEST_S:g} s are the "
            "most: give their option deadline_s less",
        )


def _tokens(token_ids: tuple[int, ...] | None, text: str | None) -> int:
    # Four bytes a token is usual; three keeps a batch of text within its budget.
    return len(token_ids) if token_ids is not None else len(text or "") // 3
