"""Batched decoding with transformers: requests are read as they come, and step together from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from honed.artifacts.version import VersionId
from honed.generation.hf.cohort import ROOM, Cohort
from honed.generation.hf.row import Row
from honed.generation.hf.sampling import sample
from honed.generation.requests import FinishReason


class Decoder:
    """All running rows. Not thread-safe: one caller at a time."""

    def __init__(
        self, model: Any, version: VersionId, end_tokens: frozenset[int], max_batch: int, max_batched_tokens: int = 2048
    ) -> None:
        """Nothing runs yet.

        Args:
            model: A causal language model in evaluation mode.
            version: What it is.
            end_tokens: They end a response.
            max_batch: Rows that step together.
            max_batched_tokens: Tokens that one pass reads, padding included; a longer prompt has a pass of its own.
        """
        self._end_tokens = end_tokens
        self._max_batch = max_batch
        self._max_batched_tokens = max_batched_tokens
        self._waiting: list[Row] = []
        self._cohorts: list[Cohort] = []
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
        for cohort in self._cohorts:
            self._advance(cohort, cohort.reach())
            stepped.extend(cohort.rows)
        for alike in _passes(joining, self._max_batched_tokens):
            cohort = self._prefill(alike)
            stepped.extend(alike)
            if not any(other.join(cohort) for other in self._cohorts):
                self._cohorts.append(cohort)
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

    def _prefill(self, rows: list[Row]) -> Cohort:
        prefixes = [row.prefix for row in rows]
        width = max(map(len, prefixes))
        device = self._model.device
        ids = torch.tensor([[0] * (width - len(prefix)) + prefix for prefix in prefixes], device=device)
        mask = torch.tensor([[0] * (width - len(prefix)) + [1] * len(prefix) for prefix in prefixes], device=device)
        cohort = Cohort(rows, mask)
        self._advance(cohort, ids)
        return cohort

    def _advance(self, cohort: Cohort, ids: torch.Tensor) -> None:
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
        samplings, generators = [row.request.sampling for row in cohort.rows], [row.generator for row in cohort.rows]
        for row, token, logprob in zip(cohort.rows, *sample(output.logits[:, -1].float(), samplings, generators), strict=True):
            self._accept(row, token, logprob)

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
            cohort.keep(wanted)
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]


def _passes(rows: Sequence[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Parts of rows that a pass reads with little padding, in no more than so many tokens."""
    part: list[Row] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: row.length):
        tokens += row.length
        if part and row.length * (len(part) + 1) > min(ROOM * tokens, max_tokens):
            yield part
            part, tokens = [], row.length
        part.append(row)
    if part:
        yield part
