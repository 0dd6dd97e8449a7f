"""How many cores this process may compute on."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")


def available_cores(quota: Path = _CPU_MAX) -> int:
    """Cores of this process, at least 1: those it is bound to, of these what its container may use, and `OMP_NUM_THREADS`.

    Args:
        quota: The file with the control group's limit, of version 2 as containers have it: microseconds of each period.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [cores]
    try:
        most, period = quota.read_text().split()
        limits.append(math.ceil(int(most) / int(period)))  # "max" for none
    except (OSError, ValueError, ZeroDivisionError):
        pass
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal():
        limits.append(int(asked))
    return max(1, min(limits))
