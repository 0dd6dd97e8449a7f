"""What vLLM loads of honed in each of its processes, by the entry point group `vllm.general_plugins`.

It registers the weight transfer backend `honed`, and makes an engine process end when the process that started it is gone: vLLM
itself leaves the engine running after a kill -9 of its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import threading

PARENT_VARIABLE = "_HONED_VLLM_PARENT"
"""Names, by process id, the process whose engine processes must not outlive it. `vllm_adapter` sets it."""

BACKEND = "honed"
"""The name of the weight transfer backend."""

CANARY_PREFIX = "honed-canary-"
"""Request ids that begin so run while everything else is paused; see `vllm_scheduler`."""


def register() -> None:
    """Registers with vLLM. Called once or more in each process, in the serving one too."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "honed.generation.vllm.weights", "DirectoryWeightTransfer")
    _follow_parent()


def _follow_parent() -> None:
    owner = os.environ.get(PARENT_VARIABLE)
    parent = multiprocessing.parent_process()
    name = "honed-follow-parent"
    if owner in {None, str(os.getpid())} or parent is None or any(thread.name == name for thread in threading.enumerate()):
        return

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name=name, daemon=True).start()
