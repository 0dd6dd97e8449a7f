"""Loading beside, promotion, and what a restart serves: one replica."""

import json
from pathlib import Path

import pytest
from tests.unit.reward.replicas import Replica, ReplicaRig

from honed.kit.errors import Conflict, DataLoss, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unavailable
from honed.reward.registry import ScorerRegistry


@pytest.fixture
def rig(tmp_path: Path) -> ReplicaRig:
    return ReplicaRig(tmp_path)


async def promote(rig: ReplicaRig, replica: Replica, name: str) -> None:
    await replica.promoter.load("rm", str(rig.make(name)))
    await replica.promoter.promote("rm", f"v-{name}")


async def test_a_loaded_version_waits_beside_the_serving_one_until_it_is_promoted(rig: ReplicaRig) -> None:
    replica = await rig.start()
    before = replica.registry.serving
    loaded = await replica.promoter.load("rm", str(rig.make("second")))
    assert (loaded.scorer.version, loaded.serving, loaded.weight) == ("v-second", False, 2.0)
    assert replica.registry.serving is before
    promoted, previous, replicas = await replica.promoter.promote("rm", "v-second")
    assert (promoted.serving, previous, replicas) == (True, "v-first", 1)
    assert replica.serving() == {"rm": "v-second", "aid": "pkg 1"}
    assert before.terms[0].scorer.version == "v-first", "whoever holds the old sum keeps it"
    states = [(s.scorer.name, s.scorer.version, s.serving) for s in replica.registry.scorers()]
    assert states == [("aid", "pkg 1", True), ("rm", "v-first", False), ("rm", "v-second", True)]


async def test_a_restart_serves_the_promoted_version_though_its_directory_is_gone(rig: ReplicaRig) -> None:
    await promote(rig, await rig.start(), "second")
    for path in (rig.root / "second").iterdir():
        path.unlink()
    assert (await rig.start()).serving()["rm"] == "v-second"


async def test_a_promotion_can_be_taken_back(rig: ReplicaRig) -> None:
    replica = await rig.start()
    await promote(rig, replica, "second")
    assert (await replica.promoter.promote("rm", "v-first"))[1] == "v-second"
    assert (await rig.start()).serving()["rm"] == "v-first"


async def test_a_new_source_in_the_run_file_voids_the_promotion(rig: ReplicaRig) -> None:
    await promote(rig, await rig.start(), "second")
    third = rig.model.model_copy(update={"source": str(rig.make("third"))})
    assert (await rig.start("a", third)).serving()["rm"] == "v-third"


async def test_a_promoted_directory_that_changed_stops_the_start(rig: ReplicaRig) -> None:
    replica = await rig.start()
    await promote(rig, replica, "second")
    await replica.promoter.promote("rm", "v-first")
    rig.make("first", "other")
    with pytest.raises(DataLoss, match=r"was promoted as version v-first and is other now.*promoted\.json"):
        await rig.start()


async def test_a_promoted_artifact_that_is_gone_stops_the_start_and_is_named(rig: ReplicaRig) -> None:
    await promote(rig, await rig.start(), "second")
    (Path(rig.location) / "demo" / "reward-models" / "rm" / "0.1" / "manifest.json").unlink()
    with pytest.raises(NotFound, match=r"version 0\.1 of reward model rm of run demo is not in the store"):
        await rig.start()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 2, "number": 1, "promoted": {"rm": {"x": 1}}, "answers": {}}', '{"format": 9}']
)
async def test_a_damaged_record_stops_the_start_and_says_what_to_do(rig: ReplicaRig, text: str) -> None:
    path = Path(rig.record.path)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(DataLoss, match=r"promoted\.json"):
        await rig.start()


async def test_a_load_that_fails_leaves_what_serves_and_publishes_nothing(rig: ReplicaRig) -> None:
    replica = await rig.start()
    (rig.root / "empty").mkdir()
    with pytest.raises(DataLoss, match="damaged"):
        await replica.promoter.load("rm", str(rig.root / "empty"), "key")
    assert replica.serving()["rm"] == "v-first"
    assert replica.sources.newest("rm") is None
    rig.make("empty")
    loaded = await replica.promoter.load("rm", str(rig.root / "empty"), "key")
    assert loaded.scorer.version == "v-empty", "a failure is not an answer"


@pytest.mark.parametrize("source", ["/etc", "{root}/../secret", "{root}/link", "relative"])
async def test_no_path_leads_out_of_the_allowed_roots(rig: ReplicaRig, source: str) -> None:
    replica = await rig.start()
    (rig.root / "link").symlink_to("/etc")
    with pytest.raises(PermissionDenied, match=r"reward\.allowed_roots"):
        await replica.promoter.load("rm", source.format(root=rig.root))
    assert len(replica.built) == 2


async def test_what_cannot_be_loaded_is_told(rig: ReplicaRig) -> None:
    replica = await rig.start()
    with pytest.raises(NotFound, match="no scorer 'other'; the settings name aid, rm"):
        await replica.promoter.load("other", str(rig.root))
    with pytest.raises(FailedPrecondition, match="is a function"):
        await replica.promoter.load("aid", str(rig.root))
    with pytest.raises(InvalidArgument, match="s3://"):
        await replica.promoter.load("rm", "s3://bucket/model")
    with pytest.raises(InvalidArgument, match="artifact:NAME/VERSION"):
        await replica.promoter.load("rm", "artifact:trained")
    with pytest.raises(NotFound, match="reward model trained of run demo"):
        await replica.promoter.load("rm", "artifact:trained/0.1")
    with pytest.raises(NotFound, match="no version v9 in memory; load it first"):
        await replica.promoter.promote("rm", "v9")
    loaded = await replica.promoter.load("rm", f"file://{rig.make('second')}")
    assert (loaded.scorer.version, loaded.source) == ("v-second", "artifact:rm/0.1")


async def test_the_same_key_is_answered_as_before(rig: ReplicaRig) -> None:
    replica = await rig.start()
    source = str(rig.make("second"))
    assert await replica.promoter.load("rm", source, "k") == await replica.promoter.load("rm", source, "k")
    assert replica.built.count(source) == 1
    answer = await replica.promoter.promote("rm", "v-second", "p")
    assert await replica.promoter.promote("rm", "v-second", "p") == answer
    restarted = await rig.start()
    assert (await restarted.promoter.promote("rm", "v-second", "p"))[1] == "v-first", "over a restart too"
    await restarted.promoter.load("rm", str(rig.root / "first"))
    with pytest.raises(Conflict, match="take another key"):
        await restarted.promoter.promote("rm", "v-first", "p")


async def test_a_promotion_that_cannot_be_recorded_does_not_happen(rig: ReplicaRig) -> None:
    replica = await rig.start()
    await replica.promoter.load("rm", str(rig.make("second")))
    Path(rig.record.path).parent.write_text("in the way")
    with pytest.raises(Unavailable, match="the old version serves on"):
        await replica.promoter.promote("rm", "v-second")
    assert replica.serving()["rm"] == "v-first"


async def test_memory_holds_the_serving_version_and_two_beside_it(rig: ReplicaRig) -> None:
    replica = await rig.start()
    for name in ("second", "third", "fourth"):
        await replica.promoter.load("rm", str(rig.make(name)))
    versions = [s.scorer.version for s in replica.registry.scorers() if s.scorer.name == "rm"]
    assert versions == ["v-first", "v-fourth", "v-third"]


async def test_nothing_serves_before_the_start(rig: ReplicaRig) -> None:
    registry = ScorerRegistry([rig.model])
    with pytest.raises(Unavailable, match="still being loaded"):
        _ = registry.serving


async def test_the_record_is_readable_by_people(rig: ReplicaRig) -> None:
    replica = await rig.start()
    await replica.promoter.load("rm", str(rig.make("second")))
    await replica.promoter.promote("rm", "v-second", "key")
    assert json.loads(Path(rig.record.path).read_text()) == {
        "format": 2,
        "number": 1,
        "promoted": {"rm": {"source": "artifact:rm/0.1", "version": "v-second", "instead_of": rig.model.source}},
        "answers": {"key": {"name": "rm", "version": "v-second", "previous": "v-first"}},
    }
