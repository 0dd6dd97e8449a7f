"""A lock on the learner's directory."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from honed.kit.errors import FailedPrecondition

WAIT_S: Final = 18.0
_POLL_S: Final = 0.5

Sleep = Callable[[float], Awaitable[None]]


@asynccontextmanager
async def locked(directory: Path, *, wait_s: float = WAIT_S, sleep: Sleep = asyncio.sleep) -> AsyncIterator[None]:
    """Holds a learner's directory: two learners on one host would write into each other's files.

    The lock is the kernel's and ends with the process, however it ends. Nothing under the directory is read or written before
    it is held.

    Raises:
        FailedPrecondition: Another process still holds it after `wait_s` seconds; the message names it.
    """
    path = directory / "lock"
    descriptor = _opened(path)
    try:
        for _ in range(max(1, round(wait_s / _POLL_S))):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await sleep(_POLL_S)
        else:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace") or "unknown"
            raise FailedPrecondition(
                f"{directory} is in use by another learner ({holder}): stop it, or give this run another directory"
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
