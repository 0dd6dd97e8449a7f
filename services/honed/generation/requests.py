"""What an engine is asked for and what it answers: sampling parameters, requests, and the chunks of a response."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from honed.artifacts.version import VersionId
from honed.generation.gate import RequestKind
from honed.kit.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; the fields of honed.v1.SamplingParams with their defaults applied.

    Attributes:
        max_tokens: The most tokens to sample; at least 1.
        temperature: Divides the logits; 0 is greedy.
        top_p: Keeps the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: Keeps the k most likely tokens; 0 keeps all.
        seed: Makes the sampling repeatable.
        stop: Texts that end the response; not part of the text.
        stop_token_ids: Tokens that end the response; the token itself is part of the token ids, not
            of the text.
        fixed_length: Sample exactly `max_tokens`, past any end-of-sequence token.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    fixed_length: bool = False

    def __post_init__(self) -> None:
        """Raises InvalidArgument for a value that no engine can honour."""
        if self.max_tokens < 1:
            raise InvalidArgument("sampling.max_tokens", f"must be at least 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidArgument("sampling.temperature", f"must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InvalidArgument("sampling.top_p", f"must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise InvalidArgument("sampling.top_k", f"must be at least 0, got {self.top_k}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise InvalidArgument("sampling.seed", f"must be in [0, 2^63), got {self.seed}")
        if self.fixed_length and (self.stop or self.stop_token_ids):
            raise InvalidArgument("sampling.fixed_length", "a response of fixed length has no stops; leave one of the two out")
        if not all(self.stop):
            raise InvalidArgument("sampling.stop", "an empty text would stop every response")


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One response to sample.

    Attributes:
        request_id: Unique among the requests in flight; appears in logs.
        prompt_token_ids: The prompt; at least one token.
        sampling: How to sample.
        want_text: Decode the response. Rollouts leave it off: decoding costs time on the path of
            every token.
        want_logprobs: Record the log-probability of each sampled token.
        kind: On whose behalf; decides when it may enter the engine.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: Sampling
    want_text: bool = True
    want_logprobs: bool = True
    kind: RequestKind = RequestKind.APPLICATION


@dataclass(frozen=True, slots=True)
class Span:
    """`version` sampled the tokens `start` (inclusive) to `end` (exclusive) of the response."""

    version: VersionId
    start: int
    end: int


class FinishReason(enum.Enum):
    """Why a response ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A response, or the part of it since the last chunk.

    Attributes:
        token_ids: Sampled tokens.
        logprobs: One value a token (nats, float32 precision), of the distribution that was sampled
            from: after temperature, top-p and top-k; at temperature 0 of the model's own. Empty
            unless asked for.
        spans: Who sampled them. Ordered, without gaps, covering exactly the chunk's tokens; they
            count from the start of the response.
        text: The decoded text; empty unless asked for.
        finish_reason: None while the response goes on.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[Span, ...]
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine can take. `max_model_len` counts prompt and response tokens together."""

    max_model_len: int
    vocab_size: int


def check_request(request: EngineRequest, limits: EngineLimits) -> None:
    """Raises InvalidArgument, naming the field, if `request` does not fit `limits`."""
    prompt = request.prompt_token_ids
    if not prompt:
        raise InvalidArgument("prompt", "empty; give at least one token")
    total = len(prompt) + request.sampling.max_tokens
    if total > limits.max_model_len:
        raise InvalidArgument(
            "prompt",
            f"{len(prompt)} prompt tokens and max_tokens {request.sampling.max_tokens} make {total}, more than the model's "
            f"{limits.max_model_len}; shorten one of them",
        )
    if max(prompt) >= limits.vocab_size or min(prompt) < 0:
        raise InvalidArgument("prompt.token_ids", f"an id is outside the vocabulary of {limits.vocab_size}")
    if any(not 0 <= token < limits.vocab_size for token in request.sampling.stop_token_ids):
        raise InvalidArgument("sampling.stop_token_ids", f"an id is outside the vocabulary of {limits.vocab_size}")
