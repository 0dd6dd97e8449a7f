"""Claims about the average of the weights: what it is, that it survives whatever the weights survive, and when it is served."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.support.learner_world import Learner, World, batches, make_world
from tests.unit.learner.samples import make_trainer, random_episodes
from torch import Tensor

from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.kit.errors import DataLoss
from honed.learner.loop.journal import read_pushes
from honed.learner.train.average import WeightAverage
from honed.learner.train.trainer import BadBatch, TrainSettings
from honed.models.loader import load_language_model
from honed.v1 import learner_pb2

DECAY = 0.6


def weights(trainer: object) -> dict[str, Tensor]:
    published: torch.nn.Module = trainer.model.published  # type: ignore[attr-defined]
    return {name: p.detach().clone() for name, p in published.named_parameters()}


def averaged(learner: Learner) -> dict[str, Tensor]:
    trainer = learner.state.training.trainer
    assert trainer.average is not None
    with trainer.average.in_place():
        return weights(trainer)


def stored(world: World, label: str) -> dict[str, Tensor]:
    directory = world.store.fetch(VersionId.parse(label), world.root / "read")
    return dict(load_language_model(directory).named_parameters())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def labels(world: World) -> list[str]:
    return [push.version for push in read_pushes(world.home)]


@pytest.fixture
def averaging(world: World) -> World:
    world.ema_decay = DECAY
    return world


def test_it_is_the_weighted_mean_of_the_weights_after_each_update_and_of_nothing_before() -> None:
    trainer = make_trainer(TrainSettings(learning_rate=1e-2), ema_decay=DECAY)
    after = []
    for number in range(4):
        trainer.update(random_episodes(12, seed=number))
        after.append(weights(trainer))
    shares = [DECAY ** (3 - number) for number in range(4)]
    assert trainer.average is not None
    now = weights(trainer)
    with trainer.average.in_place():
        for name, value in weights(trainer).items():
            mean = sum(share * each[name].double() for share, each in zip(shares, after, strict=True)) / sum(shares)
            torch.testing.assert_close(value.double(), mean, atol=1e-6, rtol=1e-5)
    assert same(weights(trainer), now), "the weights come back bit for bit"
    assert not any("value_head" in name for name in trainer.average.tensors()), "only what is published is averaged"


def test_training_does_not_read_it() -> None:
    plain, other = make_trainer(), make_trainer(ema_decay=DECAY)
    for number in range(2):
        assert plain.update(random_episodes(12, seed=number)) == other.update(random_episodes(12, seed=number))
    assert same(plain.model.tensors(), other.model.tensors())


def test_a_batch_that_is_refused_has_no_part_in_it() -> None:
    trainer = make_trainer(ema_decay=DECAY)
    trainer.update(random_episodes(12))
    before = trainer.state().cloned()
    with pytest.raises(BadBatch):
        trainer.update([*random_episodes(11), *spoiled()])
    trainer.load_state(before)
    assert same(trainer.state().average, before.average)
    assert int(before.average["updates"]) == 1


def spoiled() -> list[object]:
    return [dataclasses.replace(episode, reward=float("inf")) for episode in random_episodes(1)]


def test_that_of_another_model_is_refused_and_none_begins_afresh() -> None:
    average = WeightAverage(torch.nn.Linear(2, 2), DECAY)
    average.add()
    with pytest.raises(DataLoss, match="of other weights"):
        WeightAverage(torch.nn.Linear(3, 2), DECAY).load_tensors(average.tensors())
    average.load_tensors({})
    assert average.tensors() == {}


async def test_after_the_last_update_the_average_becomes_the_last_version_and_says_so(averaging: World) -> None:
    learner = await averaging.start()
    await averaging.to_the_end(learner)
    assert labels(averaging) == ["1.1", "1.2", "1.3", "2.3"]
    assert learner.status.served == VersionId(2, 3)
    assert (learner.status.version, learner.status.finished) == (VersionId(1, 3), True)
    assert same(stored(averaging, "2.3"), averaged(learner))
    assert same(stored(averaging, "1.3"), weights(learner.state.training.trainer))
    assert not same(stored(averaging, "2.3"), stored(averaging, "1.3"))
    lineage = averaging.store.manifest(VersionId(2, 3)).lineage
    assert (lineage.parent, lineage.figures) == ("1.3", {"average_decay": DECAY, "average_updates": 3.0})
    assert averaging.store.manifest(VersionId(1, 3)).lineage.figures == {}


async def test_a_learner_that_is_killed_ends_with_the_same_average(averaging: World, tmp_path: Path) -> None:
    straight = make_world(tmp_path / "straight")
    straight.ema_decay = DECAY
    await straight.to_the_end(await straight.start())

    for steps in (1, 2):  # a process each
        first = await averaging.start(fence=steps)
        await averaging.until(first, lambda steps=steps, first=first: first.state.training.step >= steps)  # type: ignore[misc]
    last = await averaging.start(fence=7)
    assert last.state.training.step < 3
    await averaging.to_the_end(last)
    assert last.status.served is not None
    assert same(stored(averaging, last.status.served.label), stored(straight, "2.3"))


async def test_a_finished_learner_that_starts_again_brings_the_average_in_and_makes_no_other(averaging: World) -> None:
    await averaging.to_the_end(await averaging.start())
    averaging.intake.discarding.clear()
    again = await averaging.start(fence=3)
    await averaging.to_the_end(again)
    assert again.status.served == VersionId(2, 3)
    assert [version.label for version in averaging.store.versions()] == ["0.0", "1.1", "1.2", "1.3", "2.3"]


async def test_a_run_that_is_made_longer_goes_on_from_its_weights_and_not_from_their_average(averaging: World) -> None:
    await averaging.to_the_end(await averaging.start())
    averaging.intake.discarding.clear()
    averaging.steps, averaging.intake.batches = 4, batches(1, start=4)
    longer = await averaging.start(fence=3)
    await averaging.to_the_end(longer)
    assert labels(averaging)[4:] == ["3.3", "3.4", "4.4"]
    assert same(stored(averaging, "3.3"), stored(averaging, "1.3"))
    assert averaging.store.manifest(VersionId(4, 4)).lineage.figures["average_updates"] == 4


async def test_a_roll_back_takes_the_average_back_and_the_end_makes_another(averaging: World) -> None:
    await averaging.to_the_end(await averaging.start())
    averaging.intake.discarding.clear()
    averaging.intake.batches = batches(1, start=3)
    again = await averaging.start(fence=3)
    await again.loop.roll_back(lambda: again.history.of_step(2))
    assert int(again.state.training.state().average["updates"]) == 2
    await averaging.to_the_end(again)
    assert again.status.version == VersionId(4, 3)
    assert again.status.served == VersionId(5, 3)
    assert same(stored(averaging, "5.3"), averaged(again))
    assert averaging.store.manifest(VersionId(5, 3)).lineage.figures["average_updates"] == 3


async def test_going_back_to_the_average_goes_on_from_it_and_averages_nothing_before(averaging: World) -> None:
    await averaging.to_the_end(await averaging.start())
    averaging.intake.discarding.clear()
    again = await averaging.start(fence=3)
    version, exact = await again.loop.roll_back(lambda: again.history.of_version(VersionId(2, 3)))
    assert (version, exact) == (VersionId(4, 3), False)
    await averaging.to_the_end(again)
    assert again.status.served == VersionId(4, 3)
    assert same(stored(averaging, "4.3"), stored(averaging, "2.3"))


async def test_an_average_that_generators_refuse_is_quarantined_and_the_weights_stay_served(averaging: World) -> None:
    averaging.generator.refuses = {"2.3"}
    learner = await averaging.start()
    await averaging.to_the_end(learner)
    assert averaging.generator.serving == "1.3"
    assert learner.status.served == VersionId(1, 3)
    assert learner.status.state == learner_pb2.LEARNER_STATE_FINISHED
    assert list(averaging.store.marks.all("quarantined")) == [VersionId(2, 3)]
    assert "generators refused version 2.3" in learner.status.alarms["version"]
    assert learner.state.rollbacks == 0


async def test_without_it_nothing_is_kept_or_published(world: World) -> None:
    learner = await world.start()
    await world.to_the_end(learner)
    assert labels(world) == ["1.1", "1.2", "1.3"]
    assert not list(world.home.rglob("average.safetensors"))


def test_a_run_without_an_end_is_refused_one() -> None:
    with pytest.raises(ValueError, match=r"learner\.ema_decay: .* with learner\.steps: null there is no last one"):
        RunSettings.model_validate({"learner": {"ema_decay": 0.992}})
    RunSettings.model_validate({"learner": {"ema_decay": 0.992, "steps": 10}})
