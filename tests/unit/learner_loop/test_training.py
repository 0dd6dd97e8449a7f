"""Claims about updates that fail, are stopped, or hang, about the lock, and about what is told of a bad run."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from tests.unit.learner.samples import make_trainer, random_episodes

from honed.artifacts.version import VersionId
from honed.kit.errors import FailedPrecondition, Overloaded
from honed.learner.data.episode import Episode
from honed.learner.loop.checkpoint import CheckpointStore
from honed.learner.loop.checkpoint_files import Checkpoint, Progress
from honed.learner.loop.directory_lock import locked
from honed.learner.loop.guard import Guard
from honed.learner.loop.training import Training
from honed.learner.sources.trained import TrainedIds
from honed.learner.train.trainer import BadBatch, Interrupted, Metrics, Trainer


class Ended(Exception):
    """The process would have ended."""


def die(reason: str) -> NoReturn:
    raise Ended(reason)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.state().cloned().model


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("saved", [True, False])
async def test_a_stopped_update_leaves_the_state_before_it_wherever_that_is(
    tmp_path: Path, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M21: what was trained before is not lost with it."""
    trainer, store, stopping = make_trainer(), CheckpointStore(tmp_path), asyncio.Event()
    trainer.update(random_episodes(8))
    before, name = weights(trainer), None
    if saved:
        store.save(Checkpoint(trainer.state(), Progress(TrainedIds("r"))), 1)
        name = (1, 1)
    reached, step = threading.Event(), trainer.optimizer.step

    def moved(*arguments: object) -> None:
        step(*arguments)  # type: ignore[arg-type]
        reached.set()

    def slow(self: Trainer) -> None:
        if reached.is_set():  # some optimizer steps are made: it waits for the stop
            while not self._interrupted():
                threading.Event().wait(0.005)
        if self._interrupted():
            raise Interrupted

    monkeypatch.setattr(trainer.optimizer, "step", moved)
    monkeypatch.setattr(Trainer, "_stop_if_asked", slow)
    training = Training(trainer, store, stop_within_s=0.02, die=die)
    updating = asyncio.ensure_future(
        training.update(random_episodes(8, seed=1), version=VersionId(1, 1), saved=name, stopping=stopping)
    )
    while not reached.is_set():
        await asyncio.sleep(0.005)
    assert not equal(before, weights(trainer))
    stopping.set()
    with pytest.raises(Interrupted):
        await updating
    assert equal(before, weights(trainer))
    assert trainer.step == 1


async def test_a_hung_update_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M14: nothing else ends a thread that stands in a kernel."""
    free, trainer = threading.Event(), make_trainer()

    def hang(episodes: Sequence[Episode], *, version: VersionId, interrupted: Callable[[], bool]) -> Metrics:
        free.wait(30)
        raise Interrupted

    monkeypatch.setattr(trainer, "update", hang)
    training = Training(trainer, CheckpointStore(tmp_path), timeout_s=0.05, die=die)
    try:
        with pytest.raises(Ended, match=r"within 0\.05 s \(learner\.update_timeout_s\)"):
            await training.update([], version=VersionId(1, 0), saved=None, stopping=asyncio.Event())
    finally:
        free.set()


@pytest.mark.parametrize("spoil", ["weights", "sampler", "ratio"])
def test_an_update_that_is_not_finite_or_explodes_is_refused(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    trainer, episodes = make_trainer(learner={"max_ratio": 5.0}), random_episodes(8)
    if spoil == "weights":
        with torch.no_grad():
            next(iter(trainer.model.trainable().values()))[0, 0] = float("nan")
    elif spoil == "sampler":
        episodes = [replace(e, logprobs=(-30.0,) * len(e.response)) for e in episodes]
    else:
        trainer.settings = replace(trainer.settings, learning_rate=50.0)
    with pytest.raises(BadBatch, match=r"mean ratio to the|norm"):
        trainer.update(episodes)
    assert trainer.step == 0


async def test_an_update_that_fails_by_any_other_error_is_a_bad_batch_and_leaves_the_state_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of memory killed the learner, and its successor on the same batch again."""
    trainer = make_trainer()
    before = weights(trainer)

    def exhausted() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "_check_weights", exhausted)  # after the optimizer's steps
    update = Training(trainer, CheckpointStore(tmp_path), die=die).update
    with pytest.raises(BadBatch, match="the update failed: OutOfMemoryError: CUDA out of memory") as raised:
        await update(random_episodes(8), version=VersionId(1, 0), saved=None, stopping=asyncio.Event())
    assert equal(before, weights(trainer))
    assert (raised.value.__cause__, raised.value.__context__) == (None, None), "a traceback would hold on to its tensors"
    assert "in exhausted" in caplog.text, "a fault of our own must be seen"


def test_the_guard_skips_rolls_back_once_and_gives_up() -> None:
    guard = Guard(2)
    assert [guard.failed() for _ in range(6)] == ["skip", "rollback", "skip", "fail", "skip", "fail"]
    guard.succeeded()
    assert [guard.failed() for _ in range(2)] == ["skip", "rollback"]


async def test_a_second_learner_in_one_directory_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    """M2."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async with locked(tmp_path):
        (tmp_path / "journal").mkdir()
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        holder = json.loads((tmp_path / "lock").read_text())
        with pytest.raises(FailedPrecondition, match=rf"in use by another learner.*{holder['pid']}"):
            async with locked(tmp_path, sleep=sleep):
                raise AssertionError
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
        assert sum(waits) >= 17, "it waits first: the other may just be ending"
    async with locked(tmp_path, sleep=sleep):
        pass


def test_a_disk_too_full_for_the_first_checkpoint_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(make_trainer().state(), Progress(TrainedIds("r")))

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(Overloaded, match="no space left for checkpoint"):
        CheckpointStore(tmp_path / "checkpoints").save(checkpoint, 1)
