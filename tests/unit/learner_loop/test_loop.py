"""Claims about the order in which the loop does things, and about what it leaves when it is cut short."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import pytest
from tests.support.learner_world import FakeGenerator, FakeIntake, World, batches, make_world, spoiled

from honed.artifacts.marks import Mark
from honed.artifacts.version import VersionId
from honed.kit.health import Pulse
from honed.learner.data.episode import Episode
from honed.learner.loop.checkpoint import CheckpointStore
from honed.learner.loop.journal import read_pushes, read_updates
from honed.learner.loop.push import PushReport
from honed.learner.loop.records import Totals, UpdateRecord
from honed.learner.loop.rollback import Destination
from honed.learner.train.trainer import Metrics
from honed.queue.lease import LeaseLost
from honed.v1 import learner_pb2


def ids(*numbers: range) -> list[str]:
    return [f"r-{i}/0" for each in numbers for i in each]


def labels(world: World) -> list[str]:
    return [push.version for push in read_pushes(world.home)]


async def test_every_update_is_journaled_made_durable_acknowledged_and_pushed(world: World) -> None:
    learner = await world.start()
    await world.to_the_end(learner)
    assert [rollout for update in read_updates(world.home) for rollout in update.rollout_ids] == ids(range(12))
    assert world.intake.acknowledged == ids(range(12))
    assert labels(world) == ["1.1", "1.2", "1.3"]
    assert [v.label for v in world.store.versions()] == ["0.0", "1.1", "1.2", "1.3"]
    assert learner.status.state == learner_pb2.LEARNER_STATE_FINISHED
    assert learner.status.finished
    assert learner.status.served == VersionId(1, 3)


async def test_a_checkpoint_on_a_hung_disk_ends_liveness_and_waiting_for_rollouts_does_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, world.steps = 0.0, 9
    learner = await world.start()
    pulse = learner.status.pulse = Pulse("training", 60, lambda: now, idle=True)
    writing, free, save = threading.Event(), threading.Event(), CheckpointStore.save

    def hung(self: CheckpointStore, *arguments: object, **options: object) -> object:
        writing.set()
        free.wait(30)
        return save(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointStore, "save", hung)
    running = asyncio.ensure_future(world.until(learner, world.intake.starved))
    async with asyncio.timeout(30):
        while not writing.is_set():
            await asyncio.sleep(0.001)
    assert not pulse.stopped
    now = 61.0
    assert pulse.stopped
    free.set()
    async with asyncio.timeout(30):
        await world.intake.starved.wait()
    now = 1000.0
    assert not pulse.stopped
    await running


async def test_nothing_is_acknowledged_before_its_checkpoint_is_durable(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = await world.start()
    seen = []
    save = CheckpointStore.save

    def watched(self: CheckpointStore, *arguments: object, **options: object) -> object:
        seen.append(len(world.intake.acknowledged))
        return save(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointStore, "save", watched)
    await world.to_the_end(learner)
    assert seen == [0, 4, 8]


async def test_those_who_feed_the_learner_hear_of_unsaved_rollouts_before_and_after_a_checkpoint(world: World) -> None:
    """A stale report errs towards admitting less: the update first, `unsaved` down before the entries go (H3)."""
    world.checkpoint_every = 2
    learner = await world.start()
    seen: list[tuple[int, int, int]] = []
    write = learner.reporter.write

    async def noted() -> None:
        await write()
        seen.append((learner.status.update, learner.status.unsaved, len(world.intake.acknowledged)))

    learner.reporter.write = noted  # type: ignore[method-assign]
    await world.to_the_end(learner)
    assert seen == [(0, 0, 0), (1, 4, 0), (2, 8, 0), (2, 0, 0), (3, 4, 8), (3, 0, 8), (3, 0, 12)]


async def test_a_resumed_learner_knows_what_trained_and_journals_no_update_twice(world: World) -> None:
    world.steps = 2
    await world.to_the_end(await world.start())
    journal = world.learner(load=False).journal
    journal.add_update(UpdateRecord(3, 0.0, {}, ids(range(8, 12))))  # killed after the journal, before the checkpoint
    world.intake.batches = batches(1, start=2)
    second = await world.start(fence=2)
    assert second.state.training.step == 2
    assert [i for i in ids(range(12)) if i in world.intake.trained] == ids(range(8))
    assert [record.step for record in read_updates(world.home)] == [1, 2]
    assert second.journal.totals.undone == 0, "they wait in the queue and will train"


async def test_a_run_whose_newest_checkpoint_is_damaged_finishes_and_counts_what_was_undone(world: World) -> None:
    """H4: its batch was acknowledged, so it cannot train again; the updates that were asked for are made all the same."""
    await world.to_the_end(await world.start())
    newest = CheckpointStore(world.home / "checkpoints").list()[-1]
    os.truncate(newest / "model.safetensors", 100)
    world.intake = FakeIntake(batches(1, start=3))
    second = await world.start(fence=2)
    assert second.state.training.step == 2
    assert "damaged checkpoints" in second.status.alarm
    assert second.journal.totals == Totals(trained=8, undone=4, turn=12, pushed=3)
    await world.to_the_end(second)
    assert second.journal.totals.trained == 12
    assert [len(update.rollout_ids) for update in read_updates(world.home)] == [4, 4, 4]


async def test_a_version_whose_publisher_died_before_the_push_is_brought_in_by_its_successor(world: World) -> None:
    world.steps = 2
    await world.to_the_end(await world.start())
    world.generator.serving, world.generator.calls = "1.1", []  # the push of 1.2 never arrived
    world.intake = FakeIntake([])
    second = await world.start(fence=2)
    await world.until(second, lambda: second.status.served is not None)
    assert world.generator.serving == "1.2"
    assert labels(world) == ["1.1", "1.2"], "no version counts twice"


async def test_the_sampler_is_compared_over_a_restart_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """L4: the weights of a resumed learner have the label under which they were published."""
    world.steps = 2
    await world.to_the_end(await world.start())
    world.steps, world.intake = 3, FakeIntake(batches(1, start=3))  # sampled by 1.2
    second = await world.start(fence=2)
    await world.to_the_end(second)
    assert "sampler_gap_same_weights" in read_updates(world.home)[-1].values


async def test_a_generator_that_is_down_is_waited_for_without_an_end(world: World) -> None:
    """H9: nobody reachable is an alarm, not the end."""
    world.generator.broken["commit"] = 40
    learner = await world.start()
    alarms: list[str] = []
    sleep = learner.release._sleep

    async def noted(seconds: float) -> None:
        alarms.append(learner.status.alarm)
        await sleep(seconds)

    learner.release._sleep = noted
    await world.until(learner, lambda: learner.status.served == VersionId(1, 3))
    pushes = read_pushes(world.home)
    assert pushes[-1].version == "1.3"
    assert len(pushes) < 10, "a failure that goes on is one line of the journal"
    assert "has reached no generator: commit: UNAVAILABLE: cannot commit" in alarms[0]
    assert max(learner.slept) == 30.0
    assert learner.status.alarm == ""


async def test_a_push_succeeds_with_those_that_answer(world: World) -> None:
    """H9: a missing replica stops nothing."""
    away = FakeGenerator()
    away.broken["prepare"] = 10**6
    world.generators.append(away)
    learner = await world.start()
    await world.to_the_end(learner)
    assert [(push.version, push.committed, len(push.failures)) for push in read_pushes(world.home)] == [
        ("1.1", 1, 1), ("1.2", 1, 1), ("1.3", 1, 1)
    ]  # fmt: skip
    assert learner.journal.totals.failed == 0
    assert world.store.marks.all("quarantined") == {}


async def test_a_stop_is_not_held_up_by_a_push_that_nobody_takes(world: World) -> None:
    """M21."""
    world.generator.broken["prepare"] = 10**6
    learner = await world.start()
    await world.until(learner, lambda: "push" in learner.status.alarms)
    assert world.generator.serving == ""


@pytest.mark.parametrize("overlap", [True, False])
async def test_an_update_waits_for_the_push_before_it_only_where_pushes_must_not_overlap(
    world: World, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    world.generator.commit_takes_s = 0.2
    world.settings = {"overlap_push": overlap}
    learner = await world.start()
    trainer = learner.state.training.trainer
    update = trainer.update

    def noted(episodes: Sequence[Episode], **options: object) -> Metrics:
        world.generator.calls.append(f"update {options['version']}")
        return update(episodes, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "update", noted)
    await world.to_the_end(learner)
    calls = [call for call in world.generator.calls if not call.startswith("prepare")]
    one_by_one = ["update 0.0", "commit 1.1", "update 1.1", "commit 1.2", "update 1.2", "commit 1.3"]
    assert sorted(calls) == sorted(one_by_one)
    assert (calls == one_by_one) is not overlap


async def test_a_full_disk_is_waited_for_with_an_alarm_and_leaves_nothing_half_done(
    world: World, full_disk: Callable[[bool], None]
) -> None:
    """H7: it ends nothing."""
    learner = await world.start()
    seen: list[str] = []
    sleep = learner.loop._retry.sleep

    async def noted(seconds: float) -> None:
        seen.append(learner.status.alarm)
        assert [v.label for v in world.store.versions()][-1] == "1.1"
        assert not list((world.root / "export").glob("*")), "the export is used up"
        full_disk(len(seen) < 3)
        await sleep(seconds)

    learner.loop._retry.sleep = noted
    saved = learner.state.save

    async def then_full() -> None:
        await saved()
        full_disk(learner.status.update == 2)

    learner.state.save = then_full  # type: ignore[method-assign]
    await world.to_the_end(learner)
    assert "no space left" in seen[0]
    assert learner.slept[:3] == [1.0, 2.0, 4.0]
    assert learner.status.alarm == ""
    assert labels(world) == ["1.1", "1.2", "1.3"]
    assert world.intake.acknowledged == ids(range(12))


async def test_a_learner_whose_fence_is_stale_publishes_and_saves_nothing(world: World) -> None:
    learner = await world.start()
    learner.lease.lost = True
    with pytest.raises(LeaseLost, match="current fence is 2: stop, publish nothing"):
        await world.to_the_end(learner)
    assert [v.label for v in world.store.versions()] == ["0.0"]
    assert world.generator.calls == []
    assert world.intake.acknowledged == []


async def test_a_learner_that_loses_its_lease_between_store_and_push_commits_nothing(world: World) -> None:
    learner = await world.start()
    publish = learner.release.publish

    async def then_lost(*arguments: object) -> object:
        manifest = await publish(*arguments)  # type: ignore[arg-type]
        learner.lease.lost = True
        return manifest

    learner.release.publish = then_lost  # type: ignore[method-assign, assignment]
    with pytest.raises(LeaseLost):
        await world.to_the_end(learner)
    assert [v.label for v in world.store.versions()] == ["0.0", "1.1"]
    assert world.generator.calls == []


async def test_a_paused_learner_trains_nothing_until_it_goes_on(world: World) -> None:
    learner = await world.start(paused=True)
    running = asyncio.ensure_future(world.to_the_end(learner))
    async with asyncio.timeout(30):
        while learner.status.state != learner_pb2.LEARNER_STATE_PAUSED:
            await asyncio.sleep(0.001)
    assert len(world.intake.batches) == 3
    learner.loop.resume()
    await running
    assert world.intake.batches == []


async def test_a_stop_saves_what_is_not_yet_durable(world: World) -> None:
    world.checkpoint_every, world.intake.batches = 5, batches(2)
    learner = await world.start()
    await world.until(learner, world.intake.starved)
    assert len(world.intake.acknowledged) == 8
    assert CheckpointStore(world.home / "checkpoints").at_step(2)


async def test_checkpoints_that_are_asked_for_again_and_again_leave_the_one_to_fall_back_to(world: World) -> None:
    """L5."""
    learner = await world.start()
    await world.until(learner, lambda: world.intake.starved.is_set() or learner.status.update == 3)
    store = CheckpointStore(world.home / "checkpoints")
    before = store.list()
    assert [await learner.loop.checkpoint() for _ in range(3)] == [3, 3, 3]
    assert store.list() == before
    assert len(before) == 2


async def test_a_batch_that_explodes_is_skipped_and_leaves_the_weights_as_they_were(world: World) -> None:
    good = batches(3)
    steady = await world.start()
    await world.to_the_end(steady)
    expected = steady.state.training.trainer.model.tensors()
    came = FakeIntake([good[0], spoiled(batches(1, start=7)[0]), *good[1:]])
    other = make_world(world.root / "other")
    other.intake = came
    learner = await other.start()
    await other.to_the_end(learner)
    assert other.intake.dropped == [(i, "bad_batch") for i in ids(range(28, 32))]
    assert learner.journal.totals.skipped == 1
    assert "training" not in learner.status.alarms
    got = learner.state.training.trainer.model.tensors()
    assert all(bool((value == expected[name]).all()) for name, value in got.items()), "as if it had never come"


async def test_bad_batches_in_a_row_roll_back_then_stop_training_with_an_alarm_while_the_process_goes_on(world: World) -> None:
    good, bad = batches(1), [spoiled(batch) for batch in [*batches(3, start=1), *batches(3, fence=2, start=4)]]
    world.settings, world.intake.batches = {"failures": 3}, [*good, *bad, *batches(2, fence=2, start=7)]
    learner = await world.start()
    running = asyncio.ensure_future(learner.loop.run())
    async with asyncio.timeout(60):
        while learner.status.state != learner_pb2.LEARNER_STATE_FAILED:
            await asyncio.sleep(0.001)
    assert "training has stopped: batch after batch" in learner.status.alarm
    assert learner.journal.totals.skipped == 6
    assert learner.status.fence == 2, "one roll-back came between"
    assert not running.done()
    assert not learner.status.finished
    learner.loop.resume()
    async with asyncio.timeout(60):
        await world.intake.discarding.wait()
    assert "training" not in learner.status.alarms
    learner.stopping.set()
    await running


async def test_a_policy_that_emits_padding_is_left_for_the_version_before_it_and_if_that_one_does_too_training_stops(
    world: World,
) -> None:
    world.settings, world.intake.batches = {"failures": 3}, batches(2)
    world.intake.broken = {(0, 2): 3, (1, 1): 3}
    learner = await world.start()
    running = asyncio.ensure_future(learner.loop.run())
    async with asyncio.timeout(60):
        while learner.status.state != learner_pb2.LEARNER_STATE_FAILED:
            await asyncio.sleep(0.001)
    assert "padding token" in learner.status.alarm
    assert labels(world)[-1] == "2.1", "the weights of 1.1 serve, under a fence that is above"
    assert (learner.state.training.step, learner.journal.totals.skipped) == (1, 6)
    learner.stopping.set()
    await running


async def test_a_refused_version_is_quarantined_never_pushed_again_and_left(world: World) -> None:
    """H5: the learner goes back to the version before, under a new fence, and trains on from there."""
    world.generator.refuses = {2}
    learner = await world.start()
    world.intake.batches = [*batches(2), *batches(1, start=8)]

    def refused() -> bool:
        if world.store.marks.all("quarantined"):
            world.generator.refuses = set()
        return learner.status.finished

    await world.until(learner, lambda: refused() or world.intake.starved.is_set())
    assert [mark.label for mark in world.store.marks.all("quarantined")] == ["1.2"]
    assert world.generator.calls.count("prepare 1.2") == 1, "it was tried once"
    assert "2.1" in labels(world), "the weights of 1.1 come back under a fence that is above"
    assert learner.journal.totals.refused == 1
    assert (await world.start(fence=3)).state.training.step == learner.state.training.step


async def test_a_refused_version_pushes_the_last_good_one_out_of_no_store(world: World) -> None:
    """With one version kept, a single refusal led back to the base."""
    world.generator.refuses = {2}
    learner = await world.start(keep=1)
    back: list[str] = []
    go_back = learner.state.go_back

    async def noted(destination: Destination, *, publish: bool = True) -> None:
        back.append(destination.label)
        assert [v.label for v in world.store.servable()] == ["1.1", "0.0"]
        assert world.store.latest() == VersionId(1, 2), "it stands, for whoever looks for the cause"
        world.generator.refuses = set()
        await go_back(destination, publish=publish)

    learner.state.go_back = noted  # type: ignore[method-assign]
    world.intake.batches = [*batches(2), *batches(1, start=8)]
    await world.until(learner, lambda: world.generator.serving == "2.1")
    assert back == ["1.1"]


async def test_refusals_in_a_row_lead_back_to_the_same_checkpoint(world: World) -> None:
    """The optimizer goes back too, each time: checkpoints of the refused branch must not push the good one out."""
    world.settings = {"failures": 9}
    learner = await world.start()
    back: list[tuple[str, bool]] = []
    go_back = learner.state.go_back

    async def noted(destination: Destination, *, publish: bool = True) -> None:
        back.append((destination.label, destination.checkpoint is not None))
        world.generator.refuses = {1, 2} if len(back) < 4 else set()
        await go_back(destination, publish=publish)

    learner.state.go_back = noted  # type: ignore[method-assign]
    world.generator.refuses = {2}
    await world.until(learner, lambda: world.generator.serving == "5.1")
    assert back == [("1.1", True)] * 4


async def test_of_versions_refused_in_a_row_the_last_one_stands_beside_the_last_good_one(world: World) -> None:
    """They must not fill the disk, and a learner that has just started knows from its journal alone what was committed."""
    world.steps = 3
    await world.to_the_end(await world.start())
    second = world.learner(fence=2, keep=1)
    for step in (4, 5, 6):
        manifest = await second.release.publish(VersionId(2, step), [])
        if step > 4:  # 2.4 was never pushed
            await second.release.quarantine(PushReport(manifest.version, 0, ("no",), refusals=1))
    assert [v.label for v in world.store.versions()] == ["0.0", "1.3", "2.4", "2.6"]


async def test_a_checkpoint_is_gone_back_to_though_its_version_has_left_the_store(world: World) -> None:
    world.checkpoint_every, world.steps, world.intake.batches = 3, 9, batches(5)
    world.generator.refuses = {5}
    learner = await world.start(keep=1)
    await world.until(learner, lambda: world.generator.serving == "2.3")
    assert VersionId(1, 3) not in world.store.versions()
    assert learner.state.training.state().optimizer, "everything went back, not the weights alone"


async def test_where_the_run_says_so_the_learner_goes_on_from_a_refused_version(world: World) -> None:
    world.settings = {"on_refused": "continue", "overlap_push": False}
    world.generator.refuses = {2}
    learner = await world.start()
    await world.to_the_end(learner)
    assert [mark.label for mark in world.store.marks.all("quarantined")] == ["1.2"]
    assert labels(world) == ["1.1", "1.2", "1.3"]
    assert world.generator.serving == "1.3"
    assert learner.journal.totals == Totals(trained=12, turn=12, pushed=2, failed=1, refused=1)


async def test_a_version_that_is_refused_while_the_one_before_is_answered_is_answered_too(world: World) -> None:
    world.settings = {"on_refused": "continue", "overlap_push": True}
    world.generator.refuses, world.generator.commit_takes_s = {1, 2}, 0.05
    learner = await world.start()
    quarantine = learner.release.quarantine

    async def slowly(report: PushReport) -> None:
        await asyncio.sleep(0.3)
        await quarantine(report)

    learner.release.quarantine = slowly  # type: ignore[method-assign]
    await world.to_the_end(learner)
    assert sorted(mark.label for mark in world.store.marks.all("quarantined")) == ["1.1", "1.2"]
    assert world.generator.serving == "1.3"


async def test_a_generator_that_takes_a_version_counts_though_the_others_fail_as_before(world: World) -> None:
    """The failures were the news: the version served, and nothing fresh could be sampled for ever."""
    world.steps, world.generator.broken = 1, {"prepare": 99}
    learner = await world.start()

    def taken() -> bool:
        if learner.slept and len(world.generators) == 1:
            world.generators.append(FakeGenerator())
        return world.generators[-1].serving == "1.1" and "push" not in learner.status.alarms

    await world.until(learner, taken)
    assert learner.status.served == VersionId(1, 1)
    assert [push.committed for push in read_pushes(world.home)] == [0, 1]


async def test_a_version_that_a_generator_takes_is_quarantined_no_more(world: World) -> None:
    """One that starts meanwhile may have marked it before any other had taken it."""
    world.store.marks.add(VersionId(1, 2), "quarantined", Mark("refused at the start of a generator", "now"))
    learner = await world.start()
    await world.to_the_end(learner)
    assert "1.2" in labels(world)
    assert world.store.marks.all("quarantined") == {}


async def test_with_no_staleness_allowed_the_same_weights_come_again_under_another_name(world: World) -> None:
    world.settings = {"on_refused": "continue", "overlap_push": False, "max_staleness": 0}
    world.generator.refuses, world.intake.batches, world.steps = {2}, batches(2), 9
    learner = await world.start()

    def allow() -> bool:
        if world.store.marks.all("quarantined"):
            world.generator.refuses = set()
        return world.generator.serving == "2.2"

    await world.until(learner, allow)
    assert labels(world) == ["1.1", "1.2", "2.2"]


async def test_refused_versions_beyond_the_staleness_that_is_allowed_come_again_under_another_name(world: World) -> None:
    """After two refusals no rollout is fresh enough: nothing would ever train again, nor be refused a third time."""
    world.settings = {"on_refused": "continue", "overlap_push": False, "max_staleness": 1}
    world.generator.refuses, world.steps = {2, 3}, 9
    learner = await world.start()

    def allow() -> bool:
        if len(world.store.marks.all("quarantined")) == 2:
            world.generator.refuses = set()
        return world.generator.serving == "2.3"

    await world.until(learner, allow)
    assert labels(world) == ["1.1", "1.2", "1.3", "2.3"]


async def test_training_that_stopped_over_a_refused_version_goes_on_under_another_name(world: World) -> None:
    """The refused name stands in the store with another lineage: to publish it again ended the learner."""
    world.settings = {"on_refused": "continue", "overlap_push": False, "failures": 1}
    world.generator.refuses, world.intake.batches, world.steps = {1}, batches(2), 9
    learner = await world.start()
    running = asyncio.ensure_future(learner.loop.run())
    async with asyncio.timeout(60):
        while learner.status.state != learner_pb2.LEARNER_STATE_FAILED:
            await asyncio.sleep(0.001)
        assert sorted(mark.label for mark in world.store.marks.all("quarantined")) == ["1.1", "2.1"]
        world.generator.refuses = set()
        learner.loop.resume()
        while world.generator.serving != "3.1" and not running.done():
            await asyncio.sleep(0.001)
        learner.stopping.set()
        await running
    assert learner.status.served == VersionId(3, 1)


async def test_a_version_that_is_refused_again_and_again_stops_training(world: World) -> None:
    world.settings = {"failures": 2}
    world.generator.refuses = {1}
    world.intake.batches = [*batches(1), *(batches(1, fence=fence, start=10 + fence)[0] for fence in range(2, 12))]
    world.steps = 9
    learner = await world.start()
    await world.until(learner, lambda: learner.status.state == learner_pb2.LEARNER_STATE_FAILED)
    assert "version after version is refused" in learner.status.alarm
    assert len(world.store.marks.all("quarantined")) == 4


async def test_a_code_that_refuses_at_prepare_counts_and_one_that_is_away_does_not(world: World) -> None:
    world.generator.code, world.generator.broken["prepare"] = grpc.StatusCode.DATA_LOSS, 1
    world.settings = {"on_refused": "continue"}
    learner = await world.start()
    await world.to_the_end(learner)
    assert [mark.label for mark in world.store.marks.all("quarantined")] == ["1.1"]


async def test_a_roll_back_to_a_checkpoint_is_exact_and_abandons_what_came_after(world: World) -> None:
    world.steps = 3
    learner = await world.start()
    await world.to_the_end(learner)
    history = learner.history
    version, exact = await learner.loop.roll_back(lambda: history.of_step(2))
    assert (version, exact) == (VersionId(2, 2), True)
    assert learner.state.training.step == 2
    assert learner.journal.totals == Totals(trained=8, undone=4, turn=12, pushed=3)
    assert world.intake.rollbacks == ((2, 2),)
    again = await world.start(fence=3)
    assert (again.state.training.step, again.status.version) == (2, VersionId(2, 2))
    assert world.intake.rollbacks == ((2, 2),), "a restart does not forget it"
    assert [r for r in ids(range(12)) if r in world.intake.trained] == ids(range(8))


async def test_rollouts_that_arrive_with_the_roll_back_of_a_finished_run_train(world: World) -> None:
    """They were admitted for the updates to come, and the learner already waited for entries to drop."""
    learner = await world.start()
    world.intake.arrival = asyncio.Event()
    running = asyncio.ensure_future(learner.loop.run())
    async with asyncio.timeout(60):
        await world.intake.discarding.wait()
        history = learner.history
        await learner.loop.roll_back(lambda: history.of_step(2))
        assert learner.status.state == learner_pb2.LEARNER_STATE_WAITING
        world.intake.batches = batches(1, fence=2, start=9)
        world.intake.arrival.set()
        while not learner.status.finished:
            await asyncio.sleep(0.001)
        learner.stopping.set()
        await running
    assert world.intake.dropped == []
    assert read_updates(world.home)[-1].rollout_ids == ids(range(36, 40))


async def test_a_roll_back_while_the_last_push_is_waited_for_goes_on_from_there(world: World) -> None:
    """The learner called itself finished, and waited for rollouts that nobody then asked for."""
    world.generator.commit_takes_s = 0.2
    learner = await world.start()
    running = asyncio.ensure_future(learner.loop.run())
    async with asyncio.timeout(60):
        while learner.state.training.step < 3:
            await asyncio.sleep(0.001)
        history = learner.history
        await learner.loop.roll_back(lambda: history.of_step(2))
        await world.intake.starved.wait()
        assert not learner.status.finished
        learner.stopping.set()
        await running


async def test_a_roll_back_beyond_the_checkpoints_takes_the_weights_of_the_version(world: World) -> None:
    world.steps, world.intake.batches = 5, batches(5)
    learner = await world.start()
    await world.to_the_end(learner)
    history = learner.history
    version, exact = await learner.loop.roll_back(lambda: history.of_version(VersionId(1, 1)))
    assert (version, exact) == (VersionId(2, 1), False)
    stored = world.root / "fetched" / "1.1"
    assert stored.is_dir()
    assert learner.state.training.state().optimizer == {}, "fresh"
    assert learner.journal.totals.undone == 16
    assert [r for r in ids(range(20)) if r in world.intake.trained] == ids(range(4))


@pytest.mark.parametrize("exact", [True, False])
async def test_a_roll_back_reads_what_it_undoes_once_and_beside_the_event_loop(
    world: World, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    """Far back that is the whole history: on the event loop it held everything up, and a list of all ids filled the memory."""
    world.steps, world.intake.batches = 5, batches(5)
    learner = await world.start()
    await world.to_the_end(learner)
    history, read, threads = learner.history, learner.journal.read, []

    def noted(*arguments: object, **options: object) -> object:
        threads.append(threading.current_thread() is threading.main_thread())
        return read(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(learner.journal, "read", noted)
    await learner.loop.roll_back(lambda: history.of_step(4 if exact else 1))
    assert threads == [False]
    assert learner.journal.totals.undone == (4 if exact else 16)


async def test_a_promoted_versions_checkpoint_is_kept(world: World) -> None:
    from honed.artifacts.marks import Mark

    world.steps, world.intake.batches = 6, batches(6)
    world.store.marks.add(VersionId(1, 2), "promoted", Mark("good", "2026-01-01T00:00:00+00:00"))
    await world.to_the_end(await world.start())
    steps = [int(Path(p).name.rpartition("-")[2]) for p in CheckpointStore(world.home / "checkpoints").list()]
    assert steps == [2, 5, 6]


async def test_a_run_without_an_end_trains_until_it_is_stopped(world: World) -> None:
    world.steps, world.intake.batches = None, batches(4)
    learner = await world.start()
    await world.until(learner, world.intake.starved)
    assert learner.status.update == 4
    assert not learner.status.finished
