"""Becomes a child process that does not outlive its supervisor: `python -m honed.conductor.child NICE COMMAND …`.

On Linux the kernel sends SIGTERM when the supervisor dies, however it dies; the setting survives the exec. Elsewhere the
supervisor's own clean-up has to do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ties this process to its parent and turns it into the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:  # the supervisor died before the line above
            sys.exit(1)
    os.nice(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606  # the command is the supervisor's own


if __name__ == "__main__":
    main()
