"""What vLLM loads of honed in each of its processes, by the entry point group `vllm.general_plugins`.

It makes an engine process end when the process that started it is gone: vLLM itself leaves the
engine running after a kill -9 of its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import threading

PARENT_VARIABLE = "_HONED_VLLM_PARENT"
"""Names, by process id, the process whose engine processes must not outlive it. `adapter` sets it."""

CANARY_PREFIX = "!canary-"
"""Request ids that begin so run while everything else is paused; see `scheduler`. No run's name can
begin so, hence no prompt's id, and the adapter refuses such ids from anybody else."""


def register() -> None:
    """Called by vLLM once or more in each process, in the serving one too."""
    owner = os.environ.get(PARENT_VARIABLE)
    parent = multiprocessing.parent_process()
    name = "honed-follow-parent"
    if owner in {None, str(os.getpid())} or parent is None or any(thread.name == name for thread in threading.enumerate()):
        return

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name=name, daemon=True).start()
