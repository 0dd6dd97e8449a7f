"""Random generators whose state can be stored: the learner's only source of randomness.

The learner draws from generators that it owns, never from torch's, numpy's or Python's global ones, so a checkpoint of their
states repeats every draw.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from honed.kit.errors import DataLoss


def generator(seed: int) -> torch.Generator:
    """A host generator that starts from `seed`."""
    return torch.Generator(device="cpu").manual_seed(seed)


def generator_state(source: torch.Generator) -> Tensor:
    """The state as bytes, `[n]` uint8, for safetensors."""
    return source.get_state().clone()


def load_generator_state(target: torch.Generator, state: Tensor) -> None:
    """Goes on where `state` was taken.

    Raises:
        DataLoss: when the bytes are not a generator's state.
    """
    try:
        target.set_state(state.to("cpu", torch.uint8).clone())
    except RuntimeError as error:
        raise DataLoss(f"the stored generator state of {state.numel()} bytes cannot be used: {error}") from error


def order(count: int, seed: int, number: int) -> list[int]:
    """A permutation of `count` things that follows from a seed and a number: the n-th epoch's, say."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return torch.randperm(count, generator=generator(int.from_bytes(digest[:7], "big"))).tolist()
