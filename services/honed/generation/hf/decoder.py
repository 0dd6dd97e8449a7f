"""Batched decoding with transformers: rows that were prefilled together share a key-value cache and step together.

Log-probabilities are float32 and of the distribution that is sampled from: after temperature, top-k
and top-p, in this order; at temperature 0 of the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from honed.artifacts.version import VersionId
from honed.generation.requests import Chunk, EngineRequest, FinishReason, Sampling, Span
from honed.models.text_stream import TextStream


@dataclass(slots=True, eq=False)
class Row:
    """A request being decoded. Whoever asked sets `cancelled` when the answer is no longer wanted."""

    request: EngineRequest
    text: TextStream | None
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[VersionId, int]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    sent: int = 0
    cancelled: bool = False

    def take(self) -> Chunk:
        """What was sampled since the last call."""
        start, end = self.sent, len(self.token_ids)
        self.sent = end
        return Chunk(
            token_ids=tuple(self.token_ids[start:]),
            logprobs=tuple(self.logprobs[start:]) if self.request.want_logprobs else (),
            spans=self._spans(start, end),
            text=self.text.take() if self.text is not None and self.request.want_text else "",
            finish_reason=self.finish_reason,
        )

    def _spans(self, start: int, end: int) -> tuple[Span, ...]:
        ends = [first for _, first in self.versions[1:]] + [end]
        return tuple(
            Span(version, max(first, start), min(last, end))
            for (version, first), last in zip(self.versions, ends, strict=True)
            if max(first, start) < min(last, end)
        )


@dataclass(slots=True)
class _Cohort:
    """Rows with one cache. Shorter prefixes are padded on the left: `mask` [rows, length] is 0 there."""

    rows: list[Row]
    mask: torch.Tensor
    cache: Any


class Decoder:
    """All running rows. Not thread-safe: one caller at a time."""

    def __init__(self, model: Any, version: VersionId, end_tokens: frozenset[int], max_batch: int) -> None:
        """`model` is a causal language model in evaluation mode; `end_tokens` end a response."""
        self._end_tokens = end_tokens
        self._max_batch = max_batch
        self._waiting: list[Row] = []
        self._cohorts: list[_Cohort] = []
        self._model = model
        self._version = version

    @property
    def busy(self) -> bool:
        """Whether there is anything to step."""
        return bool(self._waiting or self._cohorts)

    @property
    def model(self) -> Any:
        """What samples now."""
        return self._model

    def replace(self, model: Any, version: VersionId) -> None:
        """Swaps the model. Every row computes its prefix anew in the next step."""
        self._model, self._version = model, version
        self._waiting = [row for cohort in self._cohorts for row in cohort.rows] + self._waiting
        self._cohorts = []

    @torch.inference_mode()
    def step(self, arrivals: Sequence[Row]) -> list[Row]:
        """Takes in new rows, drops the cancelled ones, and samples one token for each that there is room for.

        Returns:
            The rows that got a token.
        """
        self._waiting = [row for row in [*self._waiting, *arrivals] if not row.cancelled]
        self._prune(lambda row: not row.cancelled)
        room = self._max_batch - sum(len(cohort.rows) for cohort in self._cohorts)
        joining, self._waiting = self._waiting[:room], self._waiting[room:]
        stepped: list[Row] = []
        for cohort in list(self._cohorts):
            last = torch.tensor([[row.token_ids[-1]] for row in cohort.rows], device=cohort.mask.device)
            cohort.mask = torch.cat([cohort.mask, torch.ones_like(cohort.mask[:, :1])], dim=1)
            self._advance(cohort, last)
            stepped.extend(cohort.rows)
        if joining:
            self._cohorts.append(self._prefill(joining))
            stepped.extend(joining)
        self._prune(lambda row: row.finish_reason is None)
        return stepped

    @torch.inference_mode()
    def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each prompt the log-probabilities of its tokens but the first, at temperature 1."""
        found = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=self._model.device)
            logprobs = self._model(ids).logits[0, :-1].float().log_softmax(-1)
            found.append([float(value) for value in logprobs.gather(1, ids[0, 1:, None])[:, 0]])
        return found

    def _prefill(self, rows: list[Row]) -> _Cohort:
        prefixes = [[*row.request.prompt_token_ids, *row.token_ids] for row in rows]
        width = max(map(len, prefixes))
        device = self._model.device
        ids = torch.tensor([[0] * (width - len(prefix)) + prefix for prefix in prefixes], device=device)
        mask = torch.tensor([[0] * (width - len(prefix)) + [1] * len(prefix) for prefix in prefixes], device=device)
        cohort = _Cohort(rows, mask, cache=None)
        self._advance(cohort, ids)
        return cohort

    def _advance(self, cohort: _Cohort, ids: torch.Tensor) -> None:
        positions = (cohort.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=cohort.mask,
            position_ids=positions,
            past_key_values=cohort.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cohort.cache = output.past_key_values
        for row, logits in zip(cohort.rows, output.logits[:, -1].float(), strict=True):
            self._accept(row, *sample(logits, row.request.sampling, row.generator))

    def _accept(self, row: Row, token: int, logprob: float) -> None:
        if not row.versions or row.versions[-1][0] != self._version:
            row.versions.append((self._version, len(row.token_ids)))
        row.token_ids.append(token)
        row.logprobs.append(logprob)
        sampling = row.request.sampling
        if not sampling.fixed_length and (token in self._end_tokens or token in sampling.stop_token_ids):
            row.finish_reason = FinishReason.STOP
        elif row.text is not None:  # the token that stops a response is no part of its text
            row.text.push(token)
            if row.text.stopped:
                row.finish_reason = FinishReason.STOP
        if row.finish_reason is None and len(row.token_ids) == sampling.max_tokens:
            row.finish_reason = FinishReason.LENGTH
        if row.finish_reason is not None and row.text is not None:
            row.text.finish()

    def _prune(self, wanted: Callable[[Row], bool]) -> None:
        for cohort in self._cohorts:
            indices = [i for i, row in enumerate(cohort.rows) if wanted(row)]
            if 0 < len(indices) < len(cohort.rows):
                kept = torch.tensor(indices, device=cohort.mask.device)
                cohort.mask = cohort.mask[kept]
                cohort.cache.batch_select_indices(kept)
            cohort.rows = [cohort.rows[i] for i in indices]
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[int, float]:
    """Draws one token.

    Args:
        logits: Float32, shape [vocabulary].
        sampling: Temperature, top-k and top-p.
        generator: Where randomness comes from; on the device of `logits`.

    Returns:
        The token, and its log-probability in the distribution that it was drawn from.
    """
    if sampling.temperature == 0:
        token = int(logits.argmax())
        return token, float(logits.log_softmax(-1)[token])
    logits = logits / sampling.temperature
    if sampling.top_k:
        worst = logits.topk(min(sampling.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p  # the first is never beyond
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -torch.inf)
    logprobs = logits.log_softmax(-1)
    token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
    return token, float(logprobs[token])


def make_row(request: EngineRequest, decode: Callable[[list[int]], str], generator: torch.Generator) -> Row:
    """A row for `request`; it decodes text only if someone needs it."""
    needs_text = request.want_text or bool(request.sampling.stop)
    text = TextStream(decode, request.prompt_token_ids, request.sampling.stop) if needs_text else None
    return Row(request, text, generator)
