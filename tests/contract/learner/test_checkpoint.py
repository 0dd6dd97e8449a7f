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

import honed.learner.checkpoint as checkpoint_module
from honed.kit.errors import DataLoss, NotFound, Overloaded
from honed.learner.checkpoint import Checkpoint, CheckpointStore, Progress, load
from honed.learner.normalise import Running
from honed.learner.update import PPOSettings, PPOTrainer

SETTINGS = PPOSettings(learning_rate=1e-3, epochs=2, minibatches=2, total_updates=10)
PROGRESS = Progress(
    stream_position="17-3",
    consumed=("g1/0", "g2/0"),
    drops={"too_stale": 3},
    totals={"episodes": 512.0, "kl": 0.1 + 0.2},
)


def new_trainer() -> PPOTrainer:
    return make_trainer(SETTINGS, normaliser=Running(clip=10.0))


def saved(store: CheckpointStore, trainer: PPOTrainer, progress: Progress = PROGRESS) -> Path:
    return store.save(Checkpoint(trainer.state(), progress))


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
            assert found.progress == PROGRESS
        assert trainer.step == start
        for batch in batches[start : {0: 2, 2: 5, 5: 6}[start]]:
            got.append(trainer.update(batch))
            saved(store, trainer)
    assert got == expected
    final = trainer.policy.tensors()
    assert all(torch.equal(value, final[name]) for name, value in straight.policy.tensors().items())
    theirs, ours = straight.state(), trainer.state()
    assert all(torch.equal(value, ours.optimizer[name]) for name, value in theirs.optimizer.items())
    assert (ours.kl, ours.normaliser) == (theirs.kl, theirs.normaliser)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    trainer = new_trainer()
    trainer.update(random_episodes(8))
    checkpoint = load(saved(CheckpointStore(tmp_path), trainer))
    state = trainer.state()
    assert checkpoint.progress == PROGRESS
    assert checkpoint.trainer.step == 1
    assert torch.equal(checkpoint.trainer.generator, state.generator)
    assert checkpoint.trainer.model.keys() == state.model.keys()
    assert checkpoint.trainer.optimizer.keys() == state.optimizer.keys()


def test_a_checkpoint_is_safetensors_and_json_and_nothing_else(tmp_path: Path) -> None:
    directory = saved(CheckpointStore(tmp_path), new_trainer())
    assert {p.suffix for p in directory.iterdir()} == {".safetensors", ".json"}


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
        lambda d: (d / "manifest.json").write_text(json.dumps({"format": 1, "step": 1, "files": 7})),
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


def test_the_last_n_are_kept_and_a_step_made_again_is_newer(tmp_path: Path) -> None:
    store, trainer = CheckpointStore(tmp_path, keep=2), new_trainer()
    for _ in range(3):
        saved(store, trainer)
    assert [p.name for p in store.list()] == ["00000002-step-0", "00000003-step-0"]
    saved(store, trainer, Progress(stream_position="9-9"))
    latest = store.latest()
    assert latest is not None
    assert latest.progress.stream_position == "9-9"
    assert store.at_step(0).progress.stream_position == "9-9"
    with pytest.raises(NotFound, match="step 7"):
        store.at_step(7)


@pytest.mark.parametrize("at", ["model.safetensors", "progress.json", "manifest.json"])
def test_a_full_disk_is_a_clear_error_and_older_checkpoints_stay(
    tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, trainer = CheckpointStore(tmp_path), new_trainer()
    whole = saved(store, trainer)
    sync = checkpoint_module._sync

    def full(path: Path) -> None:
        if path.name == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_sync", full)
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

    monkeypatch.setattr(checkpoint_module, "save_file", to_full)
    with pytest.raises(Overloaded, match="older checkpoints are intact"):
        saved(CheckpointStore(tmp_path), new_trainer())


def test_what_a_killed_writer_left_is_neither_read_nor_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    left = tmp_path / ".partial-00000001-step-5"
    left.mkdir()
    (left / "manifest.json").write_text("{}")
    assert store.latest() is None
    saved(store, new_trainer())
    assert not left.exists()
