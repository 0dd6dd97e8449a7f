"""Claims about the order in which the loop does things, and about what it leaves when it is cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
from tests.unit.learner_loop.conftest import FakeIntake, World, batches

from honed.artifacts import StoreFull, VersionId
from honed.kit.errors import Unavailable
from honed.learner.checkpoint import CheckpointStore
from honed.learner.episodes import Episode
from honed.learner.ledger import read_pushes, read_steps
from honed.learner.loop import TrainingLoop
from honed.learner.stats import UpdateStats
from honed.queue.lease import LeaseLost
from honed.v1 import learner_pb2


async def test_every_step_is_booked_made_durable_acknowledged_and_pushed(world: World) -> None:
    loop = world.loop()
    loop.resume()
    await world.to_the_end(loop)
    ids = [f"r-{i}" for i in range(12)]
    assert [rollout for step in read_steps(world.home) for rollout in step.rollout_ids] == ids
    assert world.intake.acknowledged == ids
    assert [push.version for push in read_pushes(world.home)] == ["1.0", "1.1", "1.2", "1.3"]
    assert [v.label for v in world.store.versions()] == ["1.0", "1.1", "1.2", "1.3"]
    assert loop.status.state == learner_pb2.LEARNER_STATE_FINISHED
    assert loop.status.served == VersionId(1, 3)


async def test_nothing_is_acknowledged_before_its_checkpoint_is_durable(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = world.loop()
    loop.resume()
    seen = []
    save = CheckpointStore.save

    def watched(self: CheckpointStore, checkpoint: object) -> object:
        seen.append(list(world.intake.acknowledged))
        return save(self, checkpoint)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointStore, "save", watched)
    await world.to_the_end(loop)
    assert [len(each) for each in seen] == [0, 4, 8]


async def test_a_resumed_learner_knows_what_its_checkpoint_consumed_and_books_no_step_twice(world: World) -> None:
    world.steps = 2
    first = world.loop()
    first.resume()
    await world.to_the_end(first)
    with (world.home / "steps.jsonl").open("a") as book:  # killed after the book, before the checkpoint
        book.write('{"step": 3, "ended_at": 0.0, "values": {}, "rollout_ids": ["r-8"]}\n{"step": 4, "en')
    second = world.loop(fence=2)
    progress = second.resume()
    assert second.trainer.step == 2
    assert set(progress.consumed) == {f"r-{i}" for i in range(8)}
    assert [record.step for record in read_steps(world.home)] == [1, 2]


async def test_a_version_whose_publisher_died_before_the_push_is_brought_in_by_its_successor(world: World) -> None:
    world.steps = 2
    first = world.loop()
    first.resume()
    await world.to_the_end(first)
    world.generator.serving, world.generator.calls = "1.1", []  # the push of 1.2 never arrived
    second = world.loop(fence=2)
    second.resume()
    world.intake = second._intake = FakeIntake([])  # type: ignore[assignment]
    await world.to_the_end(second)
    assert world.generator.serving == "1.2"
    assert [push.version for push in read_pushes(world.home)] == ["1.0", "1.1", "1.2"], "no version counts twice"


async def test_a_push_is_tried_again_while_a_generator_is_down(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("honed.learner.loop.PUSH_RETRY_PAUSE_S", 0.01)
    world.generator.broken["commit"] = 3
    loop = world.loop(push_retry_s=30)
    loop.resume()
    await world.to_the_end(loop)
    pushes = read_pushes(world.home)
    assert [push.version for push in pushes] == ["1.0"] * 4 + ["1.1", "1.2", "1.3"]
    assert [bool(push.failures) for push in pushes] == [True] * 3 + [False] * 4


@pytest.mark.parametrize("overlap", [True, False])
async def test_an_update_waits_for_the_push_before_it_only_where_pushes_must_not_overlap(
    world: World, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    world.generator.commit_takes_s = 0.2
    loop = world.loop(overlap_push=overlap)
    loop.resume()
    update = loop.trainer.update

    def noted(episodes: Sequence[Episode], *, version: VersionId | None = None) -> UpdateStats:
        world.generator.calls.append(f"update {version}")
        return update(episodes, version=version)

    monkeypatch.setattr(loop.trainer, "update", noted)
    await world.to_the_end(loop)
    calls = [call for call in world.generator.calls if not call.startswith("prepare")]
    one_by_one = ["commit 1.0", "update 1.0", "commit 1.1", "update 1.1", "commit 1.2", "update 1.2", "commit 1.3"]
    assert sorted(calls) == sorted(one_by_one)
    assert (calls == one_by_one) is not overlap


async def test_a_push_that_fails_for_good_ends_the_learner_though_no_batch_ever_comes(world: World) -> None:
    world.generator.broken["prepare"] = 10**6
    world.intake.batches = []
    loop = world.loop(push_retry_s=0.0)
    loop.resume()
    with pytest.raises(Unavailable, match=r"version 1\.0 could not be brought into every generator.*cannot prepare"):
        await world.to_the_end(loop)


async def test_a_full_disk_fails_the_push_leaves_no_partial_version_and_the_generator_as_it_was(
    world: World, full_disk: Callable[[], None]
) -> None:
    loop = world.loop()
    loop.resume()
    learn = TrainingLoop._learn

    async def then_full(self: TrainingLoop, held: object) -> None:
        if self.trainer.step == 1:
            await self._pushed()
            full_disk()
        await learn(self, held)  # type: ignore[arg-type]

    loop._learn = then_full.__get__(loop)  # type: ignore[method-assign]
    with pytest.raises(StoreFull, match=r"no space left; the version needs \d+ bytes"):
        await world.to_the_end(loop)
    assert world.generator.serving == "1.1"
    assert [v.label for v in world.store.versions()] == ["1.0", "1.1"]
    assert sorted(p.name for p in (world.root / "policy" / "r").iterdir() if any(p.iterdir())) == ["1.0", "1.1"]
    assert not list((world.root / "export").glob("*")), "the export is used up"


async def test_a_learner_whose_fence_is_stale_publishes_nothing(world: World) -> None:
    loop = world.loop()
    loop.resume()
    world.lease.lost = True
    with pytest.raises(LeaseLost, match="current fence is 2: stop, publish nothing"):
        await world.to_the_end(loop)
    assert world.store.versions() == []
    assert world.generator.calls == []
    assert world.intake.acknowledged == []


async def test_a_learner_that_loses_its_lease_between_store_and_push_commits_nothing(world: World) -> None:
    manifest = None
    publisher = world.publisher()
    loop = world.loop()
    publish = publisher.publish

    async def then_lost(directory: object, draft: object) -> object:
        nonlocal manifest
        manifest = await publish(directory, draft)  # type: ignore[arg-type]
        world.lease.lost = True
        return manifest

    publisher.publish = then_lost  # type: ignore[method-assign, assignment]
    loop._publisher = publisher
    loop.resume()
    with pytest.raises(LeaseLost):
        await world.to_the_end(loop)
    assert manifest is not None
    assert world.generator.calls == []


async def test_a_paused_learner_trains_nothing_until_it_goes_on(world: World) -> None:
    loop = world.loop()
    loop.resume()
    loop.unpaused.clear()
    running = asyncio.ensure_future(world.to_the_end(loop))
    async with asyncio.timeout(10):
        while loop.status.state != learner_pb2.LEARNER_STATE_PAUSED:
            await asyncio.sleep(0.001)
    assert len(world.intake.batches) == 3
    loop.unpaused.set()
    await running
    assert world.intake.batches == []


async def test_a_stop_saves_what_is_not_yet_durable(world: World) -> None:
    world.checkpoint_every, world.intake.batches = 5, batches(2)
    loop = world.loop()
    loop.resume()
    stopping = asyncio.Event()
    running = asyncio.ensure_future(loop.run(stopping, None))
    async with asyncio.timeout(30):
        while len(read_steps(world.home)) < 2:
            await asyncio.sleep(0.001)
        assert world.intake.acknowledged == []
        stopping.set()
        await running
    assert len(world.intake.acknowledged) == 8
    assert CheckpointStore(world.home / "checkpoints").at_step(2)
