"""How much memory a run needs, by use: on the machine, and on each of its GPUs. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from honed.artifacts.reward_models import TRAINED
from honed.config import RunSettings
from honed.learner.algorithms.base import make_algorithm

BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB: Final = 1 << 30
_OPTIMIZER: Final = 16  # weight, gradient and two moments of a parameter, float32
_CHECKPOINT: Final = 12  # weight and two moments
_PROCESS_GIB: Final = 0.5  # of Python and its libraries
_ROLLOUT_BYTES: Final = 1000  # of an entry in Redis, beside the response
_TOKEN_BYTES: Final = 8  # id and log-probability


@dataclass(frozen=True)
class Gpu:
    """Memory of one GPU, GiB."""

    total: float
    free: float


def memory_needed(settings: RunSettings, parameters: int, body: int | None = None) -> dict[str, float]:
    """GiB by use, on a machine without a GPU; without activations, which depend on the longest batch.

    Args:
        settings: The run's.
        parameters: Of the model.
        body: Of the model that `trained` is made of; None if that is the run's own.
    """
    return {
        **_learner_models(settings, parameters),
        "learner: the state before an update": checkpoint_gib(settings, parameters),
        **_generation(settings, parameters),
        **_reward_models(settings, parameters, body),
        "redis: rollouts since the last checkpoint": _unsaved_bytes(settings) / GIB,
        "processes": _PROCESS_GIB * (4 + settings.generation.replicas + settings.reward.replicas),
    }


def memory_of_reward_training(settings: RunSettings, parameters: int, body: int | None = None) -> dict[str, float]:
    """GiB by use while the reward model trains, beside generation alone; see `memory_needed`."""
    return {
        **_reward_training(settings, body or parameters),
        **_generation(settings, parameters),
        "processes": _PROCESS_GIB * (3 + settings.generation.replicas),
    }


def gpu_memory_needed(
    settings: RunSettings, parameters: int, gpus: Sequence[Gpu], body: int | None = None
) -> list[dict[str, float]]:
    """GiB by use on each GPU; without activations, and without the few hundred MiB that each process takes for itself.

    Args:
        settings: the run's.
        parameters: of the model.
        gpus: those that the processes see, in their order.
        body: see `memory_needed`.
    """
    bills = _generation_on_gpus(settings, parameters, gpus)
    learner = _gpu_of(settings.learner.device)
    if learner is not None and learner < len(gpus):
        bills[learner] |= _learner_models(settings, parameters)
    bills[0] |= _reward_models(settings, parameters, body)
    return bills


def gpu_memory_of_reward_training(
    settings: RunSettings, parameters: int, gpus: Sequence[Gpu], body: int | None = None
) -> list[dict[str, float]]:
    """GiB by use on each GPU while the reward model trains, beside generation alone; see `gpu_memory_needed`."""
    bills = _generation_on_gpus(settings, parameters, gpus)
    trainer = _gpu_of(settings.reward_training.device)
    if trainer is not None and trainer < len(gpus):
        bills[trainer] |= _reward_training(settings, body or parameters)
    return bills


def host_memory_needed(settings: RunSettings, parameters: int) -> dict[str, float]:
    """GiB by use, beside what lies on the GPUs."""
    every = memory_needed(settings, parameters)
    on_cpu = ("learner",) if _gpu_of(settings.learner.device) is None else ("learner: the state",)
    return {name: gib for name, gib in every.items() if name.startswith((*on_cpu, "redis", "processes"))}


def _unsaved_bytes(settings: RunSettings) -> float:
    """Rollouts leave their stream when a checkpoint holds what they taught."""
    learner = settings.learner
    updates = min(learner.checkpoint_every, learner.steps or learner.checkpoint_every)
    return updates * learner.batch * (_ROLLOUT_BYTES + _TOKEN_BYTES * settings.conductor.response_tokens)


def _learner_models(settings: RunSettings, parameters: int) -> dict[str, float]:
    """GiB of the models that the learner computes with."""
    bill = {"learner: weights, gradients, optimizer": trained_models(settings) * parameters * _OPTIMIZER / GIB}
    if make_algorithm(settings.learner).needs.reference and settings.learner.unfrozen_layers is None:
        bill["learner: reference policy"] = parameters * 4 / GIB
    if settings.learner.ema_decay is not None:
        bill["learner: average of the weights"] = parameters * 4 / GIB
    return bill


def checkpoint_gib(settings: RunSettings, parameters: int) -> float:
    """One checkpoint of the learner, GiB."""
    average = 0 if settings.learner.ema_decay is None else parameters * BYTES["float32"]
    return (trained_models(settings) * parameters * _CHECKPOINT + average) / GIB


def trained_models(settings: RunSettings) -> int:
    """The policy, and a critic of its own."""
    return 2 if settings.learner.critic == "separate" else 1


def _reward_training(settings: RunSettings, weights: int) -> dict[str, float]:
    if settings.reward_training.train == "all":
        return {"reward training: weights, gradients, optimizer": weights * _OPTIMIZER / GIB}
    return {"reward training: weights": weights * BYTES["float32"] / GIB}  # adapters and a head are small


def _generation_on_gpus(settings: RunSettings, parameters: int, gpus: Sequence[Gpu]) -> list[dict[str, float]]:
    generation, bills = settings.generation, [dict[str, float]() for _ in gpus]
    weights = parameters * BYTES[generation.dtype] / GIB
    for bill, gpu in zip(bills[: generation.tensor_parallel], gpus, strict=False):
        if generation.engine == "transformers":
            bill[f"generation: weights twice, {generation.replicas} times"] = generation.replicas * 2 * weights
        else:
            share = generation.replicas * generation.gpu_memory_share * gpu.total
            bill[f"generation: gpu_memory_share {generation.gpu_memory_share:g}, {generation.replicas} times"] = share
    return bills


def _generation(settings: RunSettings, parameters: int) -> dict[str, float]:
    generation = settings.generation
    weights = parameters * BYTES[generation.dtype] / GIB
    return {
        f"generation: weights twice, {generation.replicas} times": generation.replicas * 2 * weights,
        f"generation: KV cache, {generation.replicas} times": generation.replicas * generation.kv_cache_gib,
    }


def _reward_models(settings: RunSettings, parameters: int, body: int | None) -> dict[str, float]:
    """Those from elsewhere are taken to be as large as the policy."""
    sources = [source for scorer in settings.reward.scorers for _, source in scorer.models]
    if not sources:
        return {}
    numbers = sum(body or parameters if source == TRAINED else parameters for source in sources)
    replicas = settings.reward.replicas
    return {f"reward: {len(sources)} models, {replicas} times": replicas * numbers * BYTES["float32"] / GIB}


def _gpu_of(device: str) -> int | None:
    """Which GPU a device is; None for the CPU."""
    if device == "cpu":
        return None
    return int(device.partition(":")[2] or 0)
