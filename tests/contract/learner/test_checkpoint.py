"""Claims about checkpoints on a real file system."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tests.unit.learner.samples import make_trainer, random_episodes

import honed.learner.loop.checkpoint as checkpoint_module
import honed.learner.loop.checkpoint_files as files_module
from honed.kit.errors import DataLoss, FailedPrecondition, NotFound, Overloaded
from honed.learner.loop.checkpoint import CheckpointStore
from honed.learner.loop.checkpoint_files import Checkpoint, Progress, load
from honed.learner.objectives.normalise import Running
from honed.learner.sources.trained import TrainedIds
from honed.learner.train.trainer import Trainer, TrainSettings

SETTINGS = TrainSettings(learning_rate=1e-3, epochs=2, minibatches=2, total_updates=10)


def progress(*rollout_ids: str) -> Progress:
    trained = TrainedIds("g")
    trained.add(rollout_ids)
    return Progress(trained, "3.1", ((2, 7),))


PROGRESS = progress("g-1/0", "g-2/1", "elsewhere")


def new_trainer() -> Trainer:
    return make_trainer(SETTINGS, normaliser=Running(clip=10.0))


def saved(store: CheckpointStore, trainer: Trainer, progress: Progress = PROGRESS, fence: int = 3) -> Path:
    return store.save(Checkpoint(trainer.state(), progress), fence)


def same(one: Progress, other: Progress) -> bool:
    return (one.trained.to_bytes(), one.version, one.rollbacks) == (other.trained.to_bytes(), other.version, other.rollbacks)


def step_made(trainer: Trainer, step: int) -> Trainer:
    trainer.step = step
    return trainer


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_run_killed_and_resumed_from_disk_equals_one_that_was_never_killed(tmp_path: Path) -> None:
    batches = [random_episodes(24, seed=s) for s in range(6)]
    straight = new_trainer()
    expected = [straight.update(batch) for batch in batches]

    store = CheckpointStore(tmp_path)
    got = []
    for start in (0, 2, 5):  # a new process each time: everything comes from the directory
        trainer = new_trainer()
        found = store.latest()
        assert (found is None) == (start == 0)
        if found is not None:
            trainer.load_state(found.trainer)
            assert same(found.progress, PROGRESS)
        assert trainer.step == start
        for batch in batches[start : {0: 2, 2: 5, 5: 6}[start]]:
            got.append(trainer.update(batch))
            saved(store, trainer)
    assert got == expected
    final = trainer.model.tensors()
    assert all(torch.equal(value, final[name]) for name, value in straight.model.tensors().items())
    theirs, ours = straight.state(), trainer.state()
    assert all(torch.equal(value, ours.optimizer[name]) for name, value in theirs.optimizer.items())
    assert ours.algorithm == theirs.algorithm


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    trainer = new_trainer()
    trainer.update(random_episodes(8))
    checkpoint = load(saved(CheckpointStore(tmp_path), trainer))
    state = trainer.state()
    assert same(checkpoint.progress, PROGRESS)
    assert checkpoint.trainer.step == 1
    assert torch.equal(checkpoint.trainer.generator, state.generator)
    assert checkpoint.trainer.model.keys() == state.model.keys()
    assert checkpoint.trainer.optimizer.keys() == state.optimizer.keys()


def test_a_checkpoint_is_safetensors_json_and_one_bitmap_and_nothing_else(tmp_path: Path) -> None:
    directory = saved(CheckpointStore(tmp_path), new_trainer())
    assert {p.suffix for p in directory.iterdir()} == {".safetensors", ".json", ".bin"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: flip_a_bit(d / "model.safetensors"),
        lambda d: flip_a_bit(d / "optimizer.safetensors"),
        lambda d: (d / "generator.safetensors").unlink(),
        lambda d: os.truncate(d / "model.safetensors", 100),
        lambda d: (d / "manifest.json").unlink(),
        lambda d: (d / "manifest.json").write_text("{"),
        lambda d: (d / "manifest.json").write_text("[]"),
        lambda d: (d / "progress.json").write_text("{}"),
        lambda d: flip_a_bit(d / "trained.bin"),
        lambda d: (d / "trained.bin").unlink(),
        lambda d: (d / "manifest.json").write_text(json.dumps({"format": 2, "step": 1, "files": 7})),
        lambda d: (d / "manifest.json").write_text(json.dumps({"format": 99})),
        lambda d: shutil.rmtree(d) or d.mkdir(),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_skipped_with_the_reason_for_the_one_before(
    tmp_path: Path, spoil: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(spoil)
    store, trainer = CheckpointStore(tmp_path), new_trainer()
    saved(store, trainer)
    trainer.update(random_episodes(8))
    newest = saved(store, trainer)
    spoil(newest)
    skipped: list[tuple[Path, str]] = []
    found = store.latest(on_skip=lambda path, reason: skipped.append((path, reason)))
    assert found is not None
    assert found.trainer.step == 0
    assert [path for path, _ in skipped] == [newest]
    assert str(newest) in skipped[0][1]
    assert str(newest) in caplog.text


def test_when_none_is_whole_it_says_so_instead_of_starting_over(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    flip_a_bit(saved(store, new_trainer()) / "model.safetensors")
    with pytest.raises(DataLoss, match="none of the 1 checkpoints"):
        store.latest()


def test_the_last_n_are_kept_and_an_update_made_again_is_newer(tmp_path: Path) -> None:
    store, trainer = CheckpointStore(tmp_path, keep=2), new_trainer()
    for step in (0, 1, 2):
        saved(store, step_made(trainer, step))
    assert [p.name for p in store.list()] == ["000003-00000002-step-1", "000003-00000003-step-2"]
    saved(store, step_made(trainer, 1), progress("g-9/0"))
    latest = store.latest()
    assert latest is not None
    assert "g-9/0" in latest.progress.trained
    assert "g-9/0" in store.at_step(1).progress.trained
    with pytest.raises(NotFound, match="update 7"):
        store.at_step(7)


def test_saving_the_same_update_again_and_again_leaves_the_one_to_fall_back_to(tmp_path: Path) -> None:
    store, trainer = CheckpointStore(tmp_path, keep=2), new_trainer()
    for step in (1, 2, 2, 2):
        saved(store, step_made(trainer, step))
    assert [int(p.name.rpartition("-")[2]) for p in store.list()] == [1, 2]


def test_what_is_to_be_kept_stays(tmp_path: Path) -> None:
    store, trainer = CheckpointStore(tmp_path, keep=1), new_trainer()
    for step in (1, 2, 3):
        store.save(Checkpoint(step_made(trainer, step).state(), PROGRESS), 3, also_keep={"3.1"})
    assert [int(p.name.rpartition("-")[2]) for p in store.list()] == [1, 3]


def test_the_newest_good_one_stays_however_many_follow_it(tmp_path: Path) -> None:
    store, trainer = CheckpointStore(tmp_path, keep=2), new_trainer()
    for step in range(1, 7):
        checkpoint = Checkpoint(step_made(trainer, step).state(), PROGRESS)
        store.save(checkpoint, 3, good=lambda label: label in ("3.1", "3.2"))
    assert [path.name.rpartition("-")[2] for path in store.list()] == ["2", "5", "6"]


def test_a_learner_that_was_replaced_writes_nothing_and_removes_nothing_of_its_successors(tmp_path: Path) -> None:
    """M1: it was frozen between its check of the lease and the write."""
    store, trainer = CheckpointStore(tmp_path, keep=1), new_trainer()
    saved(store, step_made(trainer, 5), fence=3)
    theirs = saved(store, step_made(trainer, 4), fence=4)
    partial = tmp_path / ".partial-000004-00000003-step-5"
    partial.mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(FailedPrecondition, match="written under fence 4, this learner has 3"):
        saved(store, step_made(trainer, 6), fence=3)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert store.list()[-1] == theirs
    assert store.newest_fence() == 4


def test_a_late_write_of_a_lower_fence_is_not_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, but frozen after the check of the directory."""
    store, trainer = CheckpointStore(tmp_path, keep=1), new_trainer()
    write = checkpoint_module.write

    def frozen(directory: Path, checkpoint: Checkpoint) -> None:
        write(directory, checkpoint)
        monkeypatch.setattr(checkpoint_module, "write", write)
        saved(CheckpointStore(tmp_path, keep=1), step_made(new_trainer(), 6), fence=4)
        raise InterruptedError  # the successor has removed what was left half-written

    monkeypatch.setattr(checkpoint_module, "write", frozen)
    with pytest.raises(InterruptedError):
        saved(store, step_made(trainer, 9), fence=3)
    assert [p.name for p in store.list()] == ["000004-00000001-step-6"]


def test_checkpoints_of_the_format_before_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "00000007-step-7").mkdir()
    with pytest.raises(FailedPrecondition, match=r"00000007-step-7 has format 1.*begin another run"):
        CheckpointStore(tmp_path).latest()


@pytest.mark.parametrize("at", ["model.safetensors", "progress.json", "manifest.json"])
def test_a_full_disk_is_a_clear_error_and_older_checkpoints_stay(
    tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, trainer = CheckpointStore(tmp_path), new_trainer()
    whole = saved(store, trainer)
    sync = files_module.sync

    def full(path: Path) -> None:
        if path.name == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "sync", full)
        with pytest.raises(Overloaded, match="no space left for checkpoint"):
            saved(store, trainer)
    assert [p.name for p in tmp_path.iterdir()] == [whole.name]
    assert store.latest() is not None
    assert saved(store, trainer).is_dir()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_safetensors_own_report_of_a_full_disk_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def to_full(tensors: object, path: Path) -> None:
        with Path("/dev/full").open("wb", buffering=0) as device:
            device.write(b"x")

    monkeypatch.setattr(files_module, "save_file", to_full)
    with pytest.raises(Overloaded, match="older checkpoints are intact"):
        saved(CheckpointStore(tmp_path), new_trainer())


def test_what_a_killed_writer_left_is_neither_read_nor_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    left = tmp_path / ".partial-000001-00000001-step-5"
    left.mkdir()
    (left / "manifest.json").write_text("{}")
    assert store.latest() is None
    saved(store, new_trainer())
    assert not left.exists()
