"""Whole responses as a model reads them: the log-probability of each, with all responses of an example in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from honed.learner.data.batches import MicroBatch, pack_on
from honed.learner.data.continuation import Demonstration
from honed.learner.models.policy import TokenModel
from honed.models.packing import fill

_ALL: Final = 1 << 40


class Sided(Protocol):
    """An example of a fixed number of continuations, the same for every example of a batch."""

    @property
    def sides(self) -> Sequence[Demonstration]:
        """The continuations."""


@dataclass(frozen=True)
class MicroExamples:
    """Examples that a model reads at once.

    Attributes:
        examples: Their indices in the batch, `[P]`.
        batch: Their continuations, those of one example next to each other.
        width: Of the rows that `batch.slots` lead into.
        responses: Continuations in all.
    """

    examples: Tensor
    batch: MicroBatch
    width: int
    responses: int


def micro_examples(batch: Sequence[Sided], chosen: Sequence[int], max_tokens: int, model: TokenModel) -> list[MicroExamples]:
    """Packs examples of similar length; one that is longer than the budget is read alone. Continuations may share a prompt.

    Args:
        batch: All examples.
        chosen: Indices of those to read.
        max_tokens: Most tokens of one pass.
        model: What is to read them.
    """
    ordered = sorted(chosen)
    sides = {index: batch[index].sides for index in ordered}
    lengths = [sum(len(side.prompt) + len(side.response) - 1 for side in sides[i]) for i in ordered]
    found = []
    for group in fill(lengths, max_tokens):
        indices = [ordered[place] for place in group]
        continuations = [side for index in indices for side in sides[index]]
        width = max(len(side.response) for side in continuations)
        every = range(len(continuations))
        [packed] = pack_on(model.device, continuations, every, max_tokens=_ALL, share_prompts=model.packed)
        found.append(MicroExamples(torch.tensor(indices, device=model.device), packed, width, len(continuations)))
    return found


def response_logprobs(model: TokenModel, micro: MicroExamples, *, mean: bool = False) -> Tensor:
    """Log-probability of each response, nats, `[S, P]` for P examples of S sides: sum over its tokens, or their mean."""
    tokens = model.logprobs(micro.batch)
    row = torch.div(micro.batch.slots, micro.width, rounding_mode="floor")
    sums = torch.zeros(micro.responses, device=tokens.device).index_add(0, row, tokens)
    if mean:
        sums = sums / torch.bincount(row, minlength=micro.responses)
    return sums.view(len(micro.examples), -1).t()
