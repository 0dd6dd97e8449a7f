"""Checks whether a run fits into memory: the machine's, and that of its GPUs as `nvidia-smi` states it, without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from honed.artifacts.reward_models import TRAINED
from honed.check.findings import Report
from honed.config import RunSettings
from honed.learner.algorithms.base import make_algorithm

BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_GIB: Final = 1 << 30
_OPTIMIZER: Final = 16  # weight, gradient and two moments of a parameter, float32
_CHECKPOINT: Final = 12  # weight and two moments
_PROCESS_GIB: Final = 0.5  # of Python and its libraries
_QUERY: Final = ("nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits")
_QUERY_TIMEOUT_S: Final = 20.0
_SHOWN_GIB: Final = 0.05
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
        "learner: the state before an update": trained_models(settings) * parameters * _CHECKPOINT / _GIB,
        **_generation(settings, parameters),
        **_reward_models(settings, parameters, body),
        "redis: rollouts since the last checkpoint": _unsaved_bytes(settings) / _GIB,
        "processes": _PROCESS_GIB * (4 + settings.generation.replicas + settings.reward.replicas),
    }


def memory_of_reward_training(settings: RunSettings, parameters: int, body: int | None = None) -> dict[str, float]:
    """GiB by use while the reward model trains, beside generation alone; see `memory_needed`."""
    weights = body or parameters
    if settings.reward_training.train == "all":
        bill = {"reward training: weights, gradients, optimizer": weights * _OPTIMIZER / _GIB}
    else:  # adapters and a head are small
        bill = {"reward training: weights": weights * BYTES["float32"] / _GIB}
    return {
        **bill,
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
    generation, bills = settings.generation, [dict[str, float]() for _ in gpus]
    weights = parameters * BYTES[generation.dtype] / _GIB
    for bill, gpu in zip(bills[: generation.tensor_parallel], gpus, strict=False):
        if generation.engine == "transformers":
            bill[f"generation: weights twice, {generation.replicas} times"] = generation.replicas * 2 * weights
        else:
            share = generation.replicas * generation.gpu_memory_share * gpu.total
            bill[f"generation: gpu_memory_share {generation.gpu_memory_share:g}, {generation.replicas} times"] = share
    learner = _gpu_of(settings.learner.device)
    if learner is not None and learner < len(gpus):
        bills[learner] |= _learner_models(settings, parameters)
    bills[0] |= _reward_models(settings, parameters, body)
    return bills


def read_gpus(query: Callable[[], str], visible: str | None = None) -> list[Gpu]:
    """The GPUs that this run's processes see.

    Args:
        query: gives the answer of `nvidia-smi` to the query of this module.
        visible: CUDA_VISIBLE_DEVICES.

    Raises:
        ValueError: the answer, or the variable, cannot be read.
        OSError: `nvidia-smi` cannot be run.
    """
    gpus = []
    for line in query().splitlines():
        total, free = (float(part) for part in line.split(","))
        gpus.append(Gpu(total / 1024, free / 1024))
    if visible is not None:
        gpus = [gpus[number] for number in map(int, filter(None, visible.split(","))) if number < len(gpus)]
    if not gpus:
        raise ValueError("no GPU is listed")
    return gpus


def available_memory_gib() -> tuple[float, float]:
    """What is free now, and what there is in all, of the machine or of this process's control group."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    free = os.sysconf("SC_AVPHYS_PAGES") * page
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, limit - used)
    except (OSError, ValueError):
        pass
    return free / _GIB, total / _GIB


def check_memory(settings: RunSettings, report: Report, parameters: int, body: int | None = None) -> None:
    """Compares what a run needs with what there is; see `memory_needed`."""
    if not has_gpu():
        advice = "a smaller model, fewer replicas, or a smaller generation.kv_cache_gib or learner.checkpoint_every"
        _compare(report, "", memory_needed(settings, parameters, body), available_memory_gib(), advice)
        if settings.goes_through("reward_model"):
            bill = memory_of_reward_training(settings, parameters, body)
            advice = "a smaller reward_training.start_from, or train adapters or head"
            _compare(report, " while the reward model trains", bill, available_memory_gib(), advice)
        return
    advice = "a smaller model or learner.checkpoint_every"
    _compare(report, "", _host_memory_needed(settings, parameters), available_memory_gib(), advice)
    try:
        gpus = read_gpus(_nvidia_smi, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        report.warning("memory", f"that of the GPU could not be checked: nvidia-smi does not say how much there is ({error})")
        return
    advice = "a smaller generation.gpu_memory_share or model, or another learner.device"
    for number, (gpu, bill) in enumerate(zip(gpus, gpu_memory_needed(settings, parameters, gpus, body), strict=True)):
        _compare(report, f" of GPU {number}", bill, (gpu.free, gpu.total), advice)
    room = gpus[0].total * settings.generation.gpu_memory_share
    weights = parameters * BYTES[settings.generation.dtype] / settings.generation.tensor_parallel / _GIB
    if settings.generation.engine != "transformers" and weights >= room:
        report.error(
            "generation.gpu_memory_share",
            f"{settings.generation.gpu_memory_share:g} of a GPU is {room:.1f} GiB, and the weights are {weights:.1f} GiB: "
            "take a larger share, more tensor_parallel, or bfloat16 as generation.dtype",
        )


def has_gpu() -> bool:
    """Whether this machine has a GPU."""
    return Path("/dev/nvidia0").exists()


def rounded(parts: Mapping[str, float]) -> dict[str, float]:
    """For a table."""
    return {name: round(gib, 3) for name, gib in parts.items()}


def _host_memory_needed(settings: RunSettings, parameters: int) -> dict[str, float]:
    """GiB by use, beside what lies on the GPUs."""
    every = memory_needed(settings, parameters)
    on_cpu = ("learner",) if _gpu_of(settings.learner.device) is None else ("learner: the state",)
    return {name: gib for name, gib in every.items() if name.startswith((*on_cpu, "redis", "processes"))}


def _compare(report: Report, of: str, parts: Mapping[str, float], there: tuple[float, float], advice: str) -> None:
    needed, (free, total) = sum(parts.values()), there
    figures = {"needed": round(needed, 2), "free": round(free, 2), "total": round(total, 2)}
    report.figures[f"memory{of.replace(' ', '_').lower()}_gib"] = {**rounded(parts), **figures}
    bill = "; ".join(f"{name} {gib:.1f}" for name, gib in parts.items() if gib >= _SHOWN_GIB)
    text = f"the run needs about {needed:.1f} GiB{of} ({bill}); {free:.1f} of {total:.1f} GiB are free"
    if needed > total:
        report.error("memory", f"{text}: take {advice}")
    elif needed > free:
        report.warning("memory", f"{text}: end other programs, or take {advice}")


def _unsaved_bytes(settings: RunSettings) -> float:
    """Rollouts leave their stream when a checkpoint holds what they taught."""
    learner = settings.learner
    updates = min(learner.checkpoint_every, learner.steps or learner.checkpoint_every)
    return updates * learner.batch * (_ROLLOUT_BYTES + _TOKEN_BYTES * settings.conductor.response_tokens)


def _learner_models(settings: RunSettings, parameters: int) -> dict[str, float]:
    """GiB of the models that the learner computes with."""
    bill = {"learner: weights, gradients, optimizer": trained_models(settings) * parameters * _OPTIMIZER / _GIB}
    if make_algorithm(settings.learner).needs.reference and settings.learner.unfrozen_layers is None:
        bill["learner: reference policy"] = parameters * 4 / _GIB
    if settings.learner.ema_decay is not None:
        bill["learner: average of the weights"] = parameters * 4 / _GIB
    return bill


def trained_models(settings: RunSettings) -> int:
    """The policy, and a critic of its own."""
    return 2 if settings.learner.critic == "separate" else 1


def _generation(settings: RunSettings, parameters: int) -> dict[str, float]:
    generation = settings.generation
    weights = parameters * BYTES[generation.dtype] / _GIB
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
    return {f"reward: {len(sources)} models, {replicas} times": replicas * numbers * BYTES["float32"] / _GIB}


def _gpu_of(device: str) -> int | None:
    """Which GPU a device is; None for the CPU."""
    if device == "cpu":
        return None
    return int(device.partition(":")[2] or 0)


def _nvidia_smi() -> str:
    command = shutil.which(_QUERY[0])
    if command is None:
        raise FileNotFoundError("it is not installed")
    answer = subprocess.run(
        [command, *_QUERY[1:]], capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True, stdin=subprocess.DEVNULL
    )
    return answer.stdout
