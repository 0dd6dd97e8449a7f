"""A batch in padded rows `[B, T]`, straight from a transformers model: what losses of the learner are compared with."""

from __future__ import annotations

import dataclasses

import torch
from tests.unit.learner.samples import random_episodes
from torch import Tensor

from honed.learner.data.episode import Episode

GROUP = 4


def grouped_episodes(count: int = 24, seed: int = 5) -> list[Episode]:
    """Ragged responses, `GROUP` of them to each prompt's number."""
    return [dataclasses.replace(e, group_id=f"g{n // GROUP}") for n, e in enumerate(random_episodes(count, seed))]


def padded_rows(
    model: torch.nn.Module, reference: torch.nn.Module, batch: list[Episode]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the model (with gradient), of the reference and of the sampler, and the mask as numbers."""
    lengths = [len(episode.response) for episode in batch]
    mask = (torch.arange(max(lengths)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)).float()

    def padded(rows: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    logprobs, theirs = padded([_row(model, e) for e in batch]), padded([_row(reference, e).detach() for e in batch])
    return logprobs, theirs, padded([torch.tensor(e.logprobs) for e in batch]), mask


def _row(model: torch.nn.Module, episode: Episode) -> Tensor:
    tokens = torch.tensor([[*episode.prompt, *episode.response]])
    logits: Tensor = model(input_ids=tokens).logits[0, len(episode.prompt) - 1 : -1] / episode.temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(episode.response).unsqueeze(1)).squeeze(1)
