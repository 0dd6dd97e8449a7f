"""How many cores this process may compute on."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")


def available_cores(quota: Path = _CPU_MAX) -> int:
    """Cores that this process is to compute on, at least 1: those that it has, and no more than `OMP_NUM_THREADS`.

    Args:
        quota: As for `granted_cores`.
    """
    cores, asked = granted_cores(quota), os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(asked))) if asked.isdecimal() else cores


def granted_cores(quota: Path = _CPU_MAX) -> int:
    """Cores that this process and its children have, at least 1: those it is bound to, of these what its container may use.

    Args:
        quota: The file with the control group's limit, of version 2 as containers have it: microseconds of each period.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text().split()
        return max(1, min(cores, math.ceil(int(most) / int(period))))  # "max" for none
    except (OSError, ValueError, ZeroDivisionError):
        return cores
