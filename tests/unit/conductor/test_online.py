"""Claims about the end of the online loop: what it waits for when the updates are done."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.run import run_tree, settings_of

from honed.conductor.accounts import Accounts
from honed.conductor.feeder import Depths
from honed.conductor.online import OnlineLoop
from honed.conductor.state import RunState
from honed.kit.errors import FailedPrecondition
from honed.queue.progress import LearnerProgress

STEPS = 4


class FakeFeeder:
    """Sees one pair after another of the learner's update and the rollouts in the streams; the last one stays."""

    admitted, accounts, figures = 0, Accounts(), {}  # nothing changes them

    def __init__(self, *seen: tuple[int, int]) -> None:
        self._seen = list(seen)
        self._progress = LearnerProgress(fence=1, update=0, served=0)
        self.snapshot: Any = None
        self.depths = Depths(0, 0, 0)

    async def look(self) -> Any:
        update, scored = self._seen.pop(0) if len(self._seen) > 1 else self._seen[0]
        self.depths = Depths(0, 0, scored)
        self.snapshot = SimpleNamespace(progress=replace(self._progress, update=update), stages={})
        return self.snapshot


async def drained(root: Path, *seen: tuple[int, int], timeout_s: float = 60.0) -> bool:
    tree = run_tree(root, learner={"steps": STEPS}, conductor={"drain_timeout_s": timeout_s})
    loop = OnlineLoop(settings_of(tree), None, RunState())  # type: ignore[arg-type]
    async with asyncio.timeout(20):
        return await loop._drained(FakeFeeder(*seen))  # type: ignore[arg-type]


async def test_the_run_ends_when_the_streams_are_empty(tmp_path: Path) -> None:
    assert await drained(tmp_path, (STEPS, 5), (STEPS, 2), (STEPS, 0))


async def test_a_roll_back_while_the_streams_become_empty_is_fed_again(tmp_path: Path) -> None:
    """The learner then drops nothing any more, and waits for a full batch."""
    assert not await drained(tmp_path, (STEPS, 5), (STEPS - 2, 5))


async def test_streams_that_do_not_become_empty_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="the streams were not empty"):
        await drained(tmp_path, (STEPS, 5), timeout_s=0.01)
