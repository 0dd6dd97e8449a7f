"""Promotions over several replicas: what each serves, whatever was lost or died in between."""

import asyncio
from pathlib import Path

import pytest
from tests.unit.reward.replicas import Replica, ReplicaRig

from honed.artifacts.manifest import Lineage
from honed.artifacts.reward_models import RewardModelStore
from honed.kit.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from honed.queue.promotions import Announced, Candidate
from honed.reward.settings import ScorerSettings

TRAINED = ScorerSettings(name="people", kind="reward_model", source="trained")


@pytest.fixture
def rig(tmp_path: Path) -> ReplicaRig:
    return ReplicaRig(tmp_path)


def train(rig: ReplicaRig, version: str) -> str:
    """Publishes the next version of the run's own reward model."""
    directory = rig.make(version, version)
    return RewardModelStore(rig.location, "demo", "trained").publish_next(directory, Lineage()).version.label


def served(*replicas: Replica) -> set[str]:
    return {replica.serving()["rm"] for replica in replicas}


async def test_a_version_loaded_by_one_replica_is_promoted_by_another_and_served_by_all(rig: ReplicaRig) -> None:
    a, b, c = [await rig.start(name) for name in "abc"]
    await a.promoter.load("rm", str(rig.make("second")))
    assert all(replica.registry.find("rm", "v-second") for replica in (a, b, c))
    _, previous, replicas = await b.promoter.promote("rm", "v-second")
    assert (previous, replicas) == ("v-first", 3)
    assert served(a, b, c) == {"v-second"}
    assert served(await rig.start("d")) == {"v-second"}, "a newcomer too, before it is ready"
    assert rig.board.announced.promoted == {"rm": "v-second"}


async def test_promotions_at_the_same_time_end_with_one_version_everywhere_and_a_true_history(rig: ReplicaRig) -> None:
    a, b, c = [await rig.start(name) for name in "abc"]
    for name in ("second", "third"):
        await a.promoter.load("rm", str(rig.make(name)))
    answers = await asyncio.gather(a.promoter.promote("rm", "v-second"), b.promoter.promote("rm", "v-third"))
    assert {answer[1] for answer in answers} in ({"v-first", "v-second"}, {"v-first", "v-third"})
    last = rig.record.read().by_scorer["rm"].version
    for replica in (a, b, c):
        await replica.follower.catch_up()
    assert served(a, b, c) == {last}
    assert rig.record.read().number == 2


async def test_an_announcement_that_was_lost_is_made_up_for(rig: ReplicaRig) -> None:
    """The promoting replica dies between its write of the record and the announcement."""
    a, b = [await rig.start(name) for name in "ab"]
    await a.promoter.load("rm", str(rig.make("second")))
    await a.promoter.promote("rm", "v-second")
    rig.board.announced = Announced(candidates=rig.board.announced.candidates)  # Redis lost it
    b.registry.serve("rm", "v-first")
    b.follower._number = 0
    await b.follower.catch_up()
    assert served(b) == {"v-first"}, "nothing was announced, and the record was read a moment ago"
    rig.clock.now += 10.0
    await b.follower.catch_up()
    assert served(b) == {"v-second"}
    assert rig.board.announced.number == 1, "and it tells the others"


async def test_a_replica_that_does_not_follow_is_named_after_the_deadline(rig: ReplicaRig) -> None:
    a, b = [await rig.start(name) for name in "ab"]
    await a.promoter.load("rm", str(rig.make("second")))
    b.watching = False
    with pytest.raises(DeadlineExceeded, match="v-second is promoted, but not yet served by b at host-b:1"):
        await a.promoter.promote("rm", "v-second", "key")
    assert served(a) == {"v-second"}
    b.watching = True
    assert await a.promoter.promote("rm", "v-second", "key") == (a.registry.find("rm", "v-second"), "v-first", 2)


async def test_a_replica_that_leaves_in_between_is_not_waited_for(rig: ReplicaRig) -> None:
    a, b = [await rig.start(name) for name in "ab"]
    await a.promoter.load("rm", str(rig.make("second")))
    b.watching = False
    promotion = asyncio.ensure_future(a.promoter.promote("rm", "v-second"))
    while rig.record.read().number == 0:
        await asyncio.sleep(0)
    b.ready = False  # its lease has run out
    assert (await promotion)[2] == 1


async def test_a_replica_that_cannot_load_a_version_says_why_to_the_caller(rig: ReplicaRig) -> None:
    a, b = [await rig.start(name) for name in "ab"]
    b.sources.local = lambda source: Path("/nowhere")  # type: ignore[method-assign]
    with pytest.raises(FailedPrecondition, match="v-second is not loaded by b at host-b:1: /nowhere is damaged"):
        await a.promoter.load("rm", str(rig.make("second")))
    assert served(a, b) == {"v-first"}


async def test_a_disk_that_fails_does_not_end_the_watch(rig: ReplicaRig) -> None:
    a, b = [await rig.start(name) for name in "ab"]
    copy = b.sources.local

    def broken(source: str) -> Path:
        raise PermissionError(13, "read-only")

    b.sources.local = broken  # type: ignore[method-assign]
    with pytest.raises(FailedPrecondition, match="read-only"):
        await a.promoter.load("rm", str(rig.make("second")))
    b.sources.local = copy  # type: ignore[method-assign]
    rig.clock.now += 5.0
    await a.promoter.load("rm", str(rig.make("second")))
    assert b.registry.find("rm", "v-second") is not None


async def test_without_redis_replicas_serve_on_and_promote_nothing(rig: ReplicaRig) -> None:
    a = await rig.start("a")
    await a.promoter.load("rm", str(rig.make("second")))
    rig.board.away = True
    with pytest.raises(Unavailable, match="Redis is away"):
        await a.promoter.promote("rm", "v-second")
    await a.follower.catch_up()
    assert served(a) == {"v-first"}
    assert rig.record.read().number == 0
    assert served(await rig.start("b")) == {"v-first"}, "and start"


async def test_a_promotion_is_followed_by_the_record_alone_while_redis_is_away(rig: ReplicaRig) -> None:
    a, b = [await rig.start(name) for name in "ab"]
    await a.promoter.load("rm", str(rig.make("second")))
    b.watching = False
    with pytest.raises(DeadlineExceeded):
        await a.promoter.promote("rm", "v-second")
    rig.board.away = True
    rig.clock.now += 10.0
    await b.follower.catch_up()
    assert served(b) == {"v-second"}


async def test_trained_is_the_newest_artifact_at_first_and_then_what_was_promoted(rig: ReplicaRig) -> None:
    assert train(rig, "one") == "0.1"
    assert train(rig, "two") == "0.2"
    a = await rig.start("a", TRAINED)
    assert a.serving() == {"people": "two"}
    assert train(rig, "three") == "0.3"
    b = await rig.start("b", TRAINED)
    assert b.serving() == {"people": "two"}, "a refreshed model waits for its promotion"
    assert rig.board.announced.promoted == {"people": "two"}
    await b.promoter.load("people", "artifact:trained/0.3")
    await a.promoter.promote("people", "three")
    assert (a.serving(), b.serving()) == ({"people": "three"}, {"people": "three"})


async def test_replicas_that_start_at_once_serve_one_trained_version(rig: ReplicaRig) -> None:
    train(rig, "one")
    a = Replica(rig, "a", (TRAINED,))
    await a.registry.start(a.build, {"people": ("artifact:trained/0.1", None)})
    train(rig, "two")
    b = await rig.start("b", TRAINED)  # records its choice first
    a.follower._unrecorded = (TRAINED,)
    await a.follower.catch_up()
    assert a.serving() == b.serving() == {"people": "two"}


async def test_a_service_waits_for_the_runs_reward_model(rig: ReplicaRig, caplog: pytest.LogCaptureFixture) -> None:
    replica = Replica(rig, "a", (TRAINED,))
    starting = asyncio.ensure_future(replica.start())
    async with asyncio.timeout(20):
        while rig.clock.now < 65.0:
            await asyncio.sleep(0.001)
    assert not starting.done()
    with pytest.raises(Unavailable, match="still being loaded"):
        _ = replica.registry.serving
    said = [record for record in caplog.records if "the run has no reward model yet" in record.message]
    assert 2 <= len(said) <= 4, "now and then, not each second"
    train(rig, "one")
    async with asyncio.timeout(20):
        await starting
    assert replica.serving() == {"people": "one"}


async def test_facts_tell_what_is_served_loaded_and_not_loadable(rig: ReplicaRig) -> None:
    a = await rig.start()
    assert a.follower.facts() == {
        "promotions": "0",
        "loaded:aid": "pkg 1",
        "scorer:aid": "pkg 1",
        "loaded:rm": "v-first",
        "scorer:rm": "v-first",
    }
    rig.board.announced = Announced(candidates=(Candidate("rm", "v9", "artifact:rm/0.9"), Candidate("other", "x", "y")))
    await a.follower.catch_up()
    assert a.follower.facts()["failed:rm"].startswith("v9 version 0.9 of reward model rm")
