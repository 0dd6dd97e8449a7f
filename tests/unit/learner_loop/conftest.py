"""Worlds for the learner's loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.learner_world import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether the policy store's disk has room for small files only."""
    import errno
    from collections.abc import Iterator

    from honed.artifacts.files import LocalBackend

    full = False
    write = LocalBackend._write

    def cramped(self: LocalBackend, target: Path, pieces: Iterator[bytes]) -> tuple[int, str]:
        if full and target.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, target, pieces)

    def switch(now: bool) -> None:
        nonlocal full
        full = now

    monkeypatch.setattr(LocalBackend, "_write", cramped)
    return switch
