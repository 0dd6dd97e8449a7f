"""A generator's own directory: two processes in one would remove each other's versions."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from honed.kit.errors import FailedPrecondition


@contextmanager
def own_directory(directory: Path, replica: int) -> Iterator[Path]:
    """Holds the directory of one replica; yields an empty one in it for versions.

    The lock is the kernel's: it ends with the process, however that ends. Nothing is written or
    removed before it is held.

    Args:
        directory: What all generators of the run on this host, or on this volume, share.
        replica: Which of them this process is.

    Raises:
        FailedPrecondition: Another process is that replica; the message names it.
    """
    home = directory / str(replica)
    home.mkdir(parents=True, exist_ok=True)
    lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 256, 0).decode(errors="replace").strip() or "unknown"
            raise FailedPrecondition(
                f"generation replica {replica} runs already, as process {holder}, and serves from {home}: stop it, or give "
                "this process another number by HONED_GENERATION__REPLICA"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        versions = home / "versions"
        # What an earlier process fetched is of no use: nobody knows that it is whole.
        shutil.rmtree(versions, ignore_errors=True)
        versions.mkdir()
        yield versions
    finally:
        os.close(lock)
