"""Becomes a child process that does not outlive its supervisor: `python -m honed.conductor.child PARENT NICE CORES COMMAND …`.

On Linux the kernel sends SIGTERM when the supervisor dies, however it dies; the setting survives the exec. Elsewhere the
supervisor's own clean-up has to do. CORES are the numbers of those that it may compute on, joined by commas; empty for any.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from honed.conductor.priority import stand_back

PR_SET_PDEATHSIG = 1


def tied(command: Sequence[str], nice: int = 0, cores: Sequence[int] = ()) -> list[str]:
    """The command as a child of this process: `nice` behind it, and on the cores with these numbers, or on any."""
    own = (str(os.getpid()), str(nice), ",".join(map(str, cores)))
    return [sys.executable, "-m", "honed.conductor.child", *own, *command]


def main() -> None:
    """Ties this process to its parent and turns it into the command."""
    parent, nice, cores, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        # The supervisor may have died before the line above. In a container its own pid is 1, so 1 means nothing here.
        if os.getppid() != int(parent):
            sys.exit(1)
    stand_back(int(nice))
    if cores:
        with contextlib.suppress(OSError):  # none of them is there any more: then on any
            os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    os.execvp(command[0], command)  # noqa: S606  # the command is the supervisor's own


if __name__ == "__main__":
    main()
