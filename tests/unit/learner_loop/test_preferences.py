"""The source of examples out of judgements: which batch an update gets follows from the snapshot, the seed and its number."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import protovalidate
import pytest

from honed.kit.errors import InvalidArgument, Unavailable
from honed.learner.data.pair import Pair
from honed.learner.loop.checkpoint_files import Progress
from honed.learner.sources import preferences
from honed.learner.sources.preferences import PreferenceExamples
from honed.learner.sources.snapshot_keys import SnapshotKeys
from honed.learner.sources.trained import TrainedIds
from honed.v1 import preference_pb2


class Recorded:
    """A record of pairs that grows; a key gives what was there when it was used first."""

    wanted = "pair"

    def __init__(self, count: int = 0) -> None:
        self.pairs_now: list[Pair] = []
        self.frozen: dict[str, list[Pair]] = {}
        self.failing: list[Exception] = []
        self.add(count)

    def add(self, count: int) -> None:
        first = len(self.pairs_now)
        self.pairs_now += [Pair(f"pair-{n}", (1,), (n + 2,), (n + 3,)) for n in range(first, first + count)]

    async def newest(self) -> int:
        if self.failing:
            raise self.failing.pop()
        return len(self.pairs_now)

    async def freeze(self, key: str) -> str:
        if self.failing:
            raise self.failing.pop()
        return f"digest of {len(self.frozen.setdefault(key, list(self.pairs_now)))}"

    async def examples(self, key: str) -> list[Pair]:
        if self.failing:
            raise self.failing.pop()
        return self.frozen[key]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(preferences, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(preferences, "_LONGEST_PAUSE_S", 0.002)


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def source(recorded, *, refresh=True, home="learner"):
    return PreferenceExamples("run", recorded, SnapshotKeys(Path(home) / "keys", "run"), seed=7, refresh=refresh)


async def trained(pairs, updates, *, size=3, first=0):
    """The pairs of so many updates, one after another."""
    return [[held.rollout_id for held in await pairs.collect(size, step)] for step in range(first, first + updates)]


async def test_a_pass_has_each_pair_once_but_for_the_rest_and_the_next_one_another_order():
    pairs = source(Recorded(10))
    batches = await trained(pairs, 6)
    for part in (batches[:3], batches[3:]):
        assert max(Counter(pair for batch in part for pair in batch).values()) == 1
        assert [len(batch) for batch in part] == [3, 3, 3]
    assert batches[:3] != batches[3:]


async def test_a_source_that_resumes_gives_the_batches_that_come_next():
    recorded = Recorded(10)
    whole = await trained(source(recorded), 8)
    for at in (0, 2, 3, 7):
        before = source(recorded)
        await trained(before, at)
        kept, later = before.progress("1.1"), source(recorded)
        later.restore(kept)
        assert await trained(later, 8 - at, first=at) == whole[at:]
        assert later.snapshot == "digest of 10"


async def test_a_run_that_learned_from_rollouts_before_keeps_which_of_them_trained():
    rollouts = TrainedIds("run")
    rollouts.add(["run-0/0", "run-1/0"])
    pairs = source(Recorded(4))
    pairs.restore(Progress(rollouts, "1.2"))
    await trained(pairs, 1, first=2)
    kept = pairs.progress("1.3")
    assert "run-1/0" in kept.trained
    assert kept.position["first"] == 2


async def test_the_same_update_gets_the_same_batch_until_it_has_trained():
    pairs = source(Recorded(10))
    first = await pairs.collect(3, 0)
    pairs.put_back(first)
    assert await pairs.collect(3, 0) == first
    assert await pairs.collect(3, 1) != first


async def test_a_batch_that_cannot_be_applied_is_passed_over_and_stays_so_after_a_resume():
    recorded = Recorded(10)
    pairs, other = source(recorded), source(recorded)
    expected = await trained(other, 3)
    await pairs.drop(await pairs.collect(3, 0), "bad_batch")
    assert [held.rollout_id for held in await pairs.collect(3, 0)] == expected[1]
    resumed = source(recorded)
    resumed.restore(pairs.progress("1.0"))
    assert [held.rollout_id for held in await resumed.collect(3, 1)] == expected[2]


async def test_judgements_that_come_meanwhile_are_read_in_the_next_pass_if_that_is_wanted():
    for refresh, expected in ((True, 9), (False, 6)):
        recorded = Recorded(6)
        pairs = source(recorded, refresh=refresh)
        await trained(pairs, 1)
        recorded.add(3)
        batches = await trained(pairs, 4, first=1)
        assert len({pair for batch in batches[1:] for pair in batch}) == expected
        assert pairs.snapshot == f"digest of {expected}"


async def test_fewer_pairs_than_a_batch_are_a_batch():
    assert [len(batch) for batch in await trained(source(Recorded(2)), 2)] == [2, 2]


async def test_it_waits_for_judgements_and_for_the_service(caplog):
    recorded = Recorded()
    recorded.failing = [Unavailable("down"), Unavailable("down")]
    pairs = source(recorded)
    waiting = asyncio.ensure_future(pairs.collect(3, 0))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert caplog.records[-1].reason.startswith("there is no pair yet")
    recorded.add(3)
    assert len(await asyncio.wait_for(waiting, 30)) == 3


async def test_a_wait_can_be_ended_and_what_does_not_pass_is_raised():
    recorded = Recorded()
    waiting = asyncio.ensure_future(source(recorded).collect(3, 0))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    recorded.failing = [InvalidArgument("judgements", "no")]
    with pytest.raises(InvalidArgument):
        await source(recorded).collect(3, 0)


async def test_after_a_roll_back_to_published_weights_a_pass_begins_anew_under_a_key_of_its_own():
    recorded = Recorded(12)
    pairs = source(recorded)
    await trained(pairs, 6, first=4)  # passes that began at 4 and 8
    pairs.rollbacks = ((2, 3),)
    [batch] = await trained(pairs, 1, first=3)
    assert len(batch) == 3
    assert list(recorded.frozen)[-1].endswith("/2/3/2")


async def test_a_learner_that_died_before_its_checkpoint_gets_the_same_snapshot_again():
    recorded = Recorded(10)
    first = await trained(source(recorded), 2)
    recorded.add(10)
    assert await trained(source(recorded), 2) == first
    assert len(recorded.frozen) == 1


async def test_another_life_of_a_run_gets_no_snapshot_of_the_former_one():
    """It trained on the judgements of then, and on none that had come since."""
    recorded = Recorded(6)
    await trained(source(recorded), 2)
    recorded.add(6)
    anew = source(recorded, refresh=False, home="anew")
    await trained(anew, 1)
    assert anew.snapshot == "digest of 12"


async def test_nothing_is_frozen_while_no_judgement_comes_and_a_restart_finds_those_that_have_come():
    recorded = Recorded()
    waiting = asyncio.ensure_future(source(recorded).collect(3, 0))
    await asyncio.sleep(0.05)
    waiting.cancel()
    assert recorded.frozen == {}
    recorded.add(3)
    assert len(await asyncio.wait_for(source(recorded).collect(3, 0), 30)) == 3


async def test_judgements_that_are_of_no_use_are_frozen_once_and_not_again_after_a_restart():
    recorded = Recorded(4)
    read, recorded.examples = recorded.examples, useless
    waiting = asyncio.ensure_future(source(recorded).collect(3, 0))
    async with asyncio.timeout(30):
        while not recorded.frozen:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert len(recorded.frozen) == 1
    recorded.examples = read
    assert len(await asyncio.wait_for(source(recorded).collect(3, 0), 30)) == 3
    assert len(recorded.frozen) == 2


async def useless(key):
    return []


def test_a_name_that_was_lost_is_made_anew_and_one_that_cannot_be_kept_is_waited_out(tmp_path):
    keys = SnapshotKeys(tmp_path / "learner" / "keys", "run")
    first = keys.key("0/0/0")
    assert keys.key("0/0/0") == first
    (tmp_path / "learner" / "keys").write_text("")  # as a cut of power may leave it
    assert keys.key("0/0/0") not in (first, "run/learner//0/0/0")
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match=r"file/keys cannot be"):
        SnapshotKeys(tmp_path / "file" / "keys", "run").key("0/0/0")


def test_the_key_of_a_run_with_the_longest_name_is_short_enough_for_the_service(tmp_path):
    place = "/".join(["9" * 12] * 3)
    asked = preference_pb2.CreateSnapshotRequest(idempotency_key=SnapshotKeys(tmp_path / "keys", "r" * 64).key(place))
    protovalidate.validate(asked)
