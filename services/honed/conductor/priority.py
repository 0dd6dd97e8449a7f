"""How far a process and its children stand back when cores are short.

Two numbers say so on Linux. The nice value acts between the threads of one session where the kernel groups sessions
(`sched_autogroup_enabled`), and between all threads where it does not; the autogroup's own nice value acts between sessions.
Each child of the launcher is the leader of a session of its own, so both are set. See sched(7).
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

_TRIES: Final = 40
_PAUSE_S: Final = 0.05
_MOST: Final = 19


def stand_back(nice: int) -> None:
    """Lowers the priority of this process, the leader of its session, by `nice`; its children inherit it."""
    _set_session("self", os.nice(nice))


def set_back(leader: int, nice: int) -> None:
    """Sets a session's leader and its process group `nice` behind this process. Blocks for a moment.

    To stand back less than before may need a privilege; what this process may not do is left as it is.
    """
    value = min(_MOST, os.getpriority(os.PRIO_PROCESS, 0) + nice)
    _set_session(str(leader), value)
    try:
        os.setpriority(os.PRIO_PGRP, leader, value)
    except OSError as error:
        logger.info("the priority of a process group stays", extra={"pid": leader, "reason": str(error)})


def _set_session(leader: str, value: int) -> None:
    for _ in range(_TRIES):
        try:
            Path(f"/proc/{leader}/autogroup").write_text(str(value))
        except BlockingIOError:  # the kernel takes ten a second from those without privileges
            time.sleep(_PAUSE_S)
        except OSError:  # this kernel has no such groups, or the process has ended
            return
        else:
            return
    logger.info("the priority of a session stays", extra={"pid": leader})
