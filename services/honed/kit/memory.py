"""Memory that a process has freed stays with it, for what it needs next."""

from __future__ import annotations

import ctypes
import os
from typing import Final

# Of mallopt(3).
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8
_MOST: Final = 2**31 - 1
_OF_ITS_OWN: Final = 256 << 20
"""Bytes from which on a piece of memory is asked of the system, and given back to it, by itself: so that freed pieces of the
largest sizes, which are few, do not stand between others for ever."""
_VARIABLES: Final = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX")


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed; before other threads start, each of which would get a heap of its own.

    An update makes and frees the same tensors again and again. glibc gives the top of its heap back to the system whenever
    enough is free, and the system clears each page of it anew: up to sixteen thousand page faults in an update of 2 layers of
    128, and up to a tenth of its time. The process holds on to the most that it has needed, as torch does on a GPU.

    Returns:
        False where the C library is another, or the environment says how memory is to be kept; nothing is changed then.
    """
    if any(name in os.environ for name in _VARIABLES) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    wanted = ((_ARENA_MAX, 1), (_TRIM_THRESHOLD, _MOST), (_MMAP_THRESHOLD, _OF_ITS_OWN))
    return all(mallopt(what, value) == 1 for what, value in wanted)
