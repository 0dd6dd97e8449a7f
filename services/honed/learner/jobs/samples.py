"""Samples of the reference policy, for the normalisation of rewards before there is a generation service."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch

from honed.models.loader import load_language_model


@torch.no_grad()
def sample_reference(
    directory: Path, prompts: Sequence[Sequence[int]], tokens: int, *, temperature: float, rng: torch.Generator
) -> list[tuple[list[int], list[int]]]:
    """Continues each prompt by `tokens` sampled tokens; returns (prompt, response) pairs, ordered by prompt length.

    Prompts of one length go through the model together, so there is no padding.
    """
    model = load_language_model(directory)
    samples: list[tuple[list[int], list[int]]] = []
    for _, group in groupby(sorted(prompts, key=len), key=len):
        rows = torch.tensor(list(group))
        step, cache = rows, None
        for _ in range(tokens):
            output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            step = torch.multinomial((output.logits[:, -1].float() / temperature).softmax(-1), 1, generator=rng)
            rows = torch.cat([rows, step], dim=1)
        samples += [(row[:-tokens], row[-tokens:]) for row in rows.tolist()]
    return samples
