"""Which cores of this machine are left for the processes beside the learner (`learner.own_cores`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from honed.kit.cores import granted_cores
from honed.kit.errors import FailedPrecondition

_TOPOLOGY: Final = Path("/sys/devices/system/cpu")


def cores_beside(own: int | None, topology: Path = _TOPOLOGY) -> tuple[int, ...]:
    """Numbers of the cores that whatever does not train is bound to; empty for all of them.

    Hardware threads of one physical core are given away together as far as `own` allows, since one slows the other.

    Args:
        own: How many the learner has to itself; None for none.
        topology: The kernel's directory of processors.

    Raises:
        FailedPrecondition: No core would be left for the rest, or this system cannot bind processes to cores.
    """
    if own is None:
        return ()
    if not hasattr(os, "sched_setaffinity"):
        raise FailedPrecondition("learner.own_cores: this system cannot bind processes to cores, only Linux can: leave it out")
    cores = granted_cores()
    if own >= cores:
        raise FailedPrecondition(
            f"learner.own_cores: is {own}, and there are {cores} in all, of which one at least must be left for the "
            "other services: take fewer, or leave it out"
        )
    numbers = sorted(os.sched_getaffinity(0), key=lambda number: (_physical(number, topology), number))
    return tuple(sorted(numbers[:-own]))


def _physical(number: int, topology: Path) -> int:
    """The first hardware thread of the physical core that this one belongs to."""
    try:
        siblings = (topology / f"cpu{number}" / "topology" / "thread_siblings_list").read_text()
        return int(siblings.replace("-", ",").split(",")[0])
    except (OSError, ValueError):  # no such directory, as in some containers
        return number
