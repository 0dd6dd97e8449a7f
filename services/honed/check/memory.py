"""Checks whether a run fits into memory: the machine's, and that of its GPUs as `nvidia-smi` states it, without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from honed.check.bills import (
    BYTES,
    GIB,
    Gpu,
    gpu_memory_needed,
    gpu_memory_of_reward_training,
    host_memory_needed,
    memory_needed,
    memory_of_reward_training,
)
from honed.check.findings import Report
from honed.config import RunSettings

_QUERY: Final = ("nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits")
_QUERY_TIMEOUT_S: Final = 20.0
_SHOWN_GIB: Final = 0.05
_SMALLER_REWARD_TRAINING: Final = "a smaller reward_training.start_from, or train adapters or head"


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
    return free / GIB, total / GIB


def check_memory(settings: RunSettings, report: Report, parameters: int, body: int | None = None) -> None:
    """Compares what a run needs with what there is; see `memory_needed`."""
    if not has_gpu():
        advice = "a smaller model, fewer replicas, or a smaller generation.kv_cache_gib or learner.checkpoint_every"
        _compare(report, "", memory_needed(settings, parameters, body), available_memory_gib(), advice)
        if settings.goes_through("reward_model"):
            bill = memory_of_reward_training(settings, parameters, body)
            _compare(report, " while the reward model trains", bill, available_memory_gib(), _SMALLER_REWARD_TRAINING)
        return
    advice = "a smaller model or learner.checkpoint_every"
    _compare(report, "", host_memory_needed(settings, parameters), available_memory_gib(), advice)
    try:
        gpus = read_gpus(_nvidia_smi, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        report.warning("memory", f"that of the GPU could not be checked: nvidia-smi does not say how much there is ({error})")
        return
    advice = "a smaller generation.gpu_memory_share or model, or another learner.device"
    for number, (gpu, bill) in enumerate(zip(gpus, gpu_memory_needed(settings, parameters, gpus, body), strict=True)):
        _compare(report, f" of GPU {number}", bill, (gpu.free, gpu.total), advice)
    if settings.goes_through("reward_model"):
        advice = f"a smaller generation.gpu_memory_share, or {_SMALLER_REWARD_TRAINING}"
        training = gpu_memory_of_reward_training(settings, parameters, gpus, body)
        for number, (gpu, bill) in enumerate(zip(gpus, training, strict=True)):
            _compare(report, f" of GPU {number} while the reward model trains", bill, (gpu.free, gpu.total), advice)
    room = gpus[0].total * settings.generation.gpu_memory_share
    weights = parameters * BYTES[settings.generation.dtype] / settings.generation.tensor_parallel / GIB
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


def _nvidia_smi() -> str:
    command = shutil.which(_QUERY[0])
    if command is None:
        raise FileNotFoundError("it is not installed")
    answer = subprocess.run(
        [command, *_QUERY[1:]], capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True, stdin=subprocess.DEVNULL
    )
    return answer.stdout
