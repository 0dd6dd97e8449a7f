"""Compute threads of a job on a CPU, where its settings name none."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from honed.config import RunSettings
from honed.kit.cores import available_cores

SMALL: Final = 2_000_000
"""Weights of a model without its embeddings. Below it a layer takes a millisecond or two, less than another process is given at
a time: a thread that shares its core then makes the others wait more than it helps."""
_SMALL_THREADS: Final = 4


def use_threads(asked: int | None, model: nn.Module, beside: int) -> int:
    """Has torch compute with so many threads as the setting says, or with what the machine has left over.

    Args:
        asked: The setting; None chooses.
        model: What computes; its weights say how much a thread has to do.
        beside: Threads of other processes that compute on this machine meanwhile.

    Returns:
        How many.
    """
    threads = asked if asked is not None else choose_threads(_weights(model), available_cores(), beside)
    torch.set_num_threads(threads)
    return threads


def choose_threads(weights: int, cores: int, beside: int) -> int:
    """The cores that nothing else uses; of two cores, one that is shared only for a model that gains by it.

    Measured on two cores with the generator on one of them (`python -m loadtest.peers ppo`): a second thread makes an update of
    4 layers of 256 1.3 times as fast, and one of 2 layers of 128 0.7 times.

    Args:
        weights: Of the model, without embeddings.
        cores: Of this process.
        beside: Threads of other processes.
    """
    spare = cores - beside
    if weights < SMALL:
        return max(1, min(spare, _SMALL_THREADS))
    return max(spare, min(cores, 2))


def beside_generation(settings: RunSettings) -> int:
    """Compute threads of the generation service on the same machine; none on a cluster, where each Pod has its own."""
    if settings.conductor.services_elsewhere:
        return 0
    return settings.generation.threads * settings.generation.replicas


def _weights(model: nn.Module) -> int:
    looked_up = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    return sum(weight.numel() for weight in model.parameters() if id(weight) not in looked_up)
