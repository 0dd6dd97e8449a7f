"""Loading beside, promotion, and what a restart serves."""

import asyncio
import json
from pathlib import Path

import pytest
from tests.unit.reward.support import FakeScorer

from honed.config import ScorerSettings
from honed.kit.errors import Conflict, DataLoss, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unavailable
from honed.reward.registry import ScorerRegistry
from honed.reward.scorer import Scorer

MODEL = ScorerSettings(name="rm", kind="reward_model", source="first", weight=2.0)
FUNCTION = ScorerSettings(name="aid", kind="function", source="length")


class Rig:
    """A registry whose scorers' versions are the content of small files."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "models"
        self.record = directory / "state" / "promotions.json"
        self.built: list[str] = []
        self.model = MODEL.model_copy(update={"source": str(self.make("first"))})

    def make(self, name: str, version: str | None = None) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "version").write_text(version or f"v-{name}")
        return path

    def build(self, settings: ScorerSettings, source: str) -> Scorer:
        self.built.append(source)
        if settings.kind == "function":
            return FakeScorer(settings.name, "pkg 1")
        try:
            return FakeScorer(settings.name, (Path(source) / "version").read_text())
        except FileNotFoundError as error:
            raise DataLoss(f"{source} is damaged") from error

    async def start(self, *settings: ScorerSettings) -> ScorerRegistry:
        registry = ScorerRegistry(settings or (self.model, FUNCTION), self.build, self.record, [self.root])
        await registry.start()
        return registry


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def serving(registry: ScorerRegistry) -> dict[str, str]:
    return {term.scorer.name: term.scorer.version for term in registry.serving.terms}


async def test_a_loaded_version_waits_beside_the_serving_one_until_it_is_promoted(rig: Rig) -> None:
    registry = await rig.start()
    before = registry.serving
    loaded = await registry.load("rm", str(rig.make("second")))
    assert (loaded.scorer.version, loaded.serving, loaded.weight) == ("v-second", False, 2.0)
    assert registry.serving is before
    promoted, previous = await registry.promote("rm", "v-second")
    assert (promoted.serving, previous) == (True, "v-first")
    assert serving(registry) == {"rm": "v-second", "aid": "pkg 1"}
    assert serving_of(before) == "v-first", "whoever holds the old sum keeps it"
    states = [(s.scorer.name, s.scorer.version, s.serving) for s in registry.scorers()]
    assert states == [("aid", "pkg 1", True), ("rm", "v-first", False), ("rm", "v-second", True)]


def serving_of(reward: object) -> str:
    version: str = reward.terms[0].scorer.version  # type: ignore[attr-defined]
    return version


async def test_a_restart_serves_the_promoted_version(rig: Rig) -> None:
    registry = await rig.start()
    await registry.load("rm", str(rig.make("second")))
    await registry.promote("rm", "v-second")
    assert serving(await rig.start())["rm"] == "v-second"


async def test_a_promotion_can_be_taken_back(rig: Rig) -> None:
    registry = await rig.start()
    await registry.load("rm", str(rig.make("second")))
    await registry.promote("rm", "v-second")
    assert (await registry.promote("rm", "v-first"))[1] == "v-second"
    assert serving(await rig.start())["rm"] == "v-first"


async def test_a_new_source_in_the_run_file_voids_the_promotion(rig: Rig) -> None:
    registry = await rig.start()
    await registry.load("rm", str(rig.make("second")))
    await registry.promote("rm", "v-second")
    third = rig.model.model_copy(update={"source": str(rig.make("third"))})
    assert serving(await rig.start(third))["rm"] == "v-third"


async def test_a_promoted_model_that_changed_or_went_away_stops_the_start(rig: Rig) -> None:
    registry = await rig.start()
    await registry.load("rm", str(rig.make("second")))
    await registry.promote("rm", "v-second")
    rig.make("second", "other")
    with pytest.raises(DataLoss, match=r"was promoted as version v-second and is other now.*promotions\.json"):
        await rig.start()
    (rig.root / "second" / "version").unlink()
    with pytest.raises(DataLoss, match="damaged"):
        await rig.start()


async def test_a_damaged_record_stops_the_start_and_says_what_to_do(rig: Rig) -> None:
    rig.record.parent.mkdir()
    for text in ("{", "[]", '{"format": 1, "promoted": {"rm": {"x": 1}}, "answers": {}}', '{"format": 9}'):
        rig.record.write_text(text)
        with pytest.raises(DataLoss, match=r"promotions\.json"):
            await rig.start()


async def test_a_load_that_fails_leaves_what_serves(rig: Rig) -> None:
    registry = await rig.start()
    (rig.root / "empty").mkdir()
    with pytest.raises(DataLoss, match="damaged"):
        await registry.load("rm", str(rig.root / "empty"), "key")
    assert serving(registry)["rm"] == "v-first"
    rig.make("empty")
    assert (await registry.load("rm", str(rig.root / "empty"), "key")).scorer.version == "v-empty", "a failure is not an answer"


@pytest.mark.parametrize("source", ["/etc", "{root}/../secret", "{root}/link", "relative"])
async def test_no_path_leads_out_of_the_allowed_roots(rig: Rig, source: str) -> None:
    registry = await rig.start()
    (rig.root / "link").symlink_to("/etc")
    with pytest.raises(PermissionDenied, match=r"reward\.allowed_roots"):
        await registry.load("rm", source.format(root=rig.root))
    assert len(rig.built) == 2


async def test_what_cannot_be_loaded_is_told(rig: Rig) -> None:
    registry = await rig.start()
    with pytest.raises(NotFound, match="no scorer 'other'; the settings name aid, rm"):
        await registry.load("other", str(rig.root))
    with pytest.raises(FailedPrecondition, match="is a function"):
        await registry.load("aid", str(rig.root))
    with pytest.raises(InvalidArgument, match="s3://"):
        await registry.load("rm", "s3://bucket/model")
    with pytest.raises(NotFound, match="no version v9 in memory; load it first"):
        await registry.promote("rm", "v9")
    assert (await registry.load("rm", f"file://{rig.make('second')}")).scorer.version == "v-second"


async def test_the_same_key_is_answered_as_before(rig: Rig) -> None:
    registry = await rig.start()
    source = str(rig.make("second"))
    first, again = await asyncio.gather(registry.load("rm", source, "k"), registry.load("rm", source, "k"))
    assert first == again
    assert rig.built.count(source) == 1
    answer = await registry.promote("rm", "v-second", "p")
    assert await registry.promote("rm", "v-second", "p") == answer
    restarted = await rig.start()
    assert (await restarted.promote("rm", "v-second", "p"))[1] == "v-first", "over a restart too"
    with pytest.raises(Conflict, match="take another key"):
        await registry.promote("rm", "v-first", "p")


async def test_a_promotion_that_cannot_be_recorded_does_not_happen(rig: Rig) -> None:
    registry = await rig.start()
    await registry.load("rm", str(rig.make("second")))
    rig.record.parent.write_text("in the way")
    with pytest.raises(Unavailable, match="the old version serves on"):
        await registry.promote("rm", "v-second")
    assert serving(registry)["rm"] == "v-first"


async def test_memory_holds_the_serving_version_and_two_beside_it(rig: Rig) -> None:
    registry = await rig.start()
    for name in ("second", "third", "fourth"):
        await registry.load("rm", str(rig.make(name)))
    assert [s.scorer.version for s in registry.scorers() if s.scorer.name == "rm"] == ["v-first", "v-fourth", "v-third"]


async def test_nothing_serves_before_the_start(rig: Rig) -> None:
    registry = ScorerRegistry([MODEL], rig.build, rig.record, [])
    with pytest.raises(Unavailable, match="still being loaded"):
        _ = registry.serving


async def test_the_record_is_readable_by_people(rig: Rig) -> None:
    registry = await rig.start()
    source = rig.make("second")
    await registry.load("rm", str(source))
    await registry.promote("rm", "v-second", "key")
    assert json.loads(rig.record.read_text()) == {
        "format": 1,
        "promoted": {"rm": {"source": str(source), "version": "v-second", "instead_of": rig.model.source}},
        "answers": {"key": {"name": "rm", "version": "v-second", "previous": "v-first"}},
    }
