"""Claims about reward models in the store, and the record of their promotions."""

import json
from pathlib import Path

import pytest
from tests.contract.artifacts.stores import damage, make_source

from honed.artifacts.draft import VersionDraft
from honed.artifacts.manifest import Lineage
from honed.artifacts.marks import Mark
from honed.artifacts.promotions import Promoted, PromotionAnswer, PromotionRecord, PromotionState
from honed.artifacts.reward_models import ArtifactRef, RewardModelStore, find_reward_model
from honed.artifacts.store import PolicyStore
from honed.artifacts.tokenizer import fetch_tokenizer
from honed.artifacts.version import VersionId
from honed.kit.errors import DataLoss, InvalidArgument, NotFound

MADE_OF = Lineage(
    parent="0.0",
    config_hash="c",
    reward_model_version="digest-1",
    preference_snapshot="snapshot",
    created_at="now",
    figures={"agreement": 0.74, "judgements": 70_000.0},
)


@pytest.fixture
def store(location: str) -> RewardModelStore:
    return RewardModelStore(location, "demo", "trained")


def test_a_reward_model_is_fetched_with_what_made_it(store: RewardModelStore, location: str, tmp_path: Path) -> None:
    manifest = store.publish_next(make_source(tmp_path / "source", 1.0), MADE_OF)
    assert (manifest.version, manifest.kind, manifest.name) == (VersionId(0, 1), "reward-model", "trained")
    fetched = RewardModelStore(location, "demo", "trained").fetch(VersionId(0, 1), tmp_path / "cache", manifest.digest)
    assert (fetched / "model.safetensors").read_bytes() == (tmp_path / "source" / "model.safetensors").read_bytes()
    assert store.manifest(VersionId(0, 1)).lineage == MADE_OF


def test_versions_count_up_and_the_same_files_are_the_same_version(store: RewardModelStore, tmp_path: Path) -> None:
    one, other = make_source(tmp_path / "one", 1.0), make_source(tmp_path / "other", 2.0)
    assert store.publish_next(one, MADE_OF).version == VersionId(0, 1)
    assert store.publish_next(one, Lineage(created_at="later")).version == VersionId(0, 1)
    assert store.publish_next(other, MADE_OF).version == VersionId(0, 2)
    assert store.publish_next(one, MADE_OF).version == VersionId(0, 3)


def test_reward_models_and_policies_of_a_run_do_not_meet(store: RewardModelStore, location: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    policies, other = PolicyStore(location, "demo"), RewardModelStore(location, "demo", "other")
    policies.publish(source, VersionDraft(VersionId(0, 0), ()))
    store.publish_next(source, MADE_OF)
    assert (policies.versions(), store.versions(), other.versions()) == ([VersionId(0, 0)], [VersionId(0, 1)], [])
    policies.retain(1)
    assert store.versions() == [VersionId(0, 1)]
    assert RewardModelStore.names(location, "demo") == ["trained"]
    with pytest.raises(NotFound, match=r"version 0\.1 of reward model other of run demo"):
        other.manifest(VersionId(0, 1))


def test_a_policy_in_the_place_of_a_reward_model_is_refused(store: RewardModelStore, location: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    policy = PolicyStore(location, "demo").publish(source, VersionDraft(VersionId(0, 1), ()))
    store.publish_next(source, MADE_OF)
    damage(location, "reward-models/trained/0.1/manifest.json", policy.to_bytes())
    with pytest.raises(DataLoss, match="belongs"):
        store.fetch(VersionId(0, 1), tmp_path / "cache")


def test_what_a_version_may_not_hold_stays_behind(store: RewardModelStore, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    (source / "training_args.bin").write_bytes(b"pickle")
    (source / ".cache").mkdir()
    (source / ".cache" / "x.json").write_text("{}")
    assert [entry.path for entry in store.publish_next(source, MADE_OF).files] == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_retention_keeps_the_newest_the_serving_and_the_promoted(store: RewardModelStore, tmp_path: Path) -> None:
    for value in range(6):
        store.publish_next(make_source(tmp_path / "source", value), MADE_OF)
    store.marks.add(VersionId(0, 1), "promoted", Mark("release", "now"))
    assert [v.step for v in store.retire(2, ["artifact:trained/0.3", "artifact:other/0.2", "/a/path"])] == [2, 4]
    assert [v.step for v in store.versions()] == [1, 3, 5, 6]


def test_a_version_of_scores_leads_to_the_judgements_behind_it(store: RewardModelStore, location: str, tmp_path: Path) -> None:
    store.publish_next(make_source(tmp_path / "source", 1.0), MADE_OF)
    later = Lineage(reward_model_version="digest-2", preference_snapshot="later")
    RewardModelStore(location, "demo", "other").publish_next(make_source(tmp_path / "source", 2.0), later)
    found = find_reward_model(location, "demo", "digest-2")
    assert found is not None
    assert (found.name, found.lineage.preference_snapshot) == ("other", "later")
    assert find_reward_model(location, "demo", "digest-3") is None


def test_a_reference_is_read_and_written_and_a_wrong_one_is_refused() -> None:
    ref = ArtifactRef.parse("artifact:trained/0.12")
    assert ref == ArtifactRef("trained", VersionId(0, 12))
    assert str(ref) == "artifact:trained/0.12"
    assert ArtifactRef.parse("/models/rm") is None
    for wrong in ("artifact:", "artifact:trained", "artifact:../x/0.1", "artifact:trained/newest"):
        with pytest.raises(InvalidArgument):
            ArtifactRef.parse(wrong)


def test_the_record_of_promotions_is_read_as_it_was_written(location: str) -> None:
    record = PromotionRecord(location, "demo")
    assert record.read() == PromotionState()
    state = PromotionState().with_promotion("rm", Promoted("artifact:trained/0.1", "digest", "trained"))
    state = state.with_answer("key", PromotionAnswer("rm", "digest", "before"))
    record.write(state)
    assert PromotionRecord(location, "demo").read() == state
    assert (state.number, state.versions) == (1, {"rm": "digest"})
    record.write(state.with_promotion("rm", Promoted("artifact:trained/0.2", "newer", "trained")))
    assert record.read().number == 2


def test_a_record_of_the_next_release_is_read_without_what_is_new(location: str) -> None:
    row = {"source": "artifact:trained/0.1", "version": "digest", "instead_of": "trained", "zz_newer": 1}
    answer = {"name": "rm", "version": "digest", "previous": "before", "zz_newer": 1}
    document = {"format": 2, "number": 3, "promoted": {"rm": row}, "answers": {"key": answer}, "zz_newer": 1}
    PromotionRecord(location, "demo").write(PromotionState())
    damage(location, "reward/promoted.json", json.dumps(document).encode())
    state = PromotionRecord(location, "demo").read()
    assert state.by_scorer == {"rm": Promoted("artifact:trained/0.1", "digest", "trained")}
    assert (state.number, state.answers) == (3, {"key": PromotionAnswer("rm", "digest", "before")})


@pytest.mark.parametrize("data", [b"{", b"[]", json.dumps({"format": 1}).encode(), b'{"format": 2}'])
def test_a_damaged_record_is_an_error_that_says_what_to_do(location: str, data: bytes) -> None:
    PromotionRecord(location, "demo").write(PromotionState())
    damage(location, "reward/promoted.json", data)
    with pytest.raises(DataLoss, match=r"reward/promoted\.json"):
        PromotionRecord(location, "demo").read()


def test_the_tokenizer_comes_without_the_weights(location: str, tmp_path: Path) -> None:
    store = PolicyStore(location, "demo")
    with pytest.raises(NotFound, match="no version in the store yet"):
        fetch_tokenizer(store, tmp_path / "tokenizer")
    source = make_source(tmp_path / "source")
    store.publish(source, VersionDraft(VersionId(0, 0), ()))
    store.publish(make_source(tmp_path / "other", 2.0), VersionDraft(VersionId(1, 1), ()))
    into = fetch_tokenizer(store, tmp_path / "tokenizer")
    assert sorted(path.name for path in into.iterdir()) == ["config.json", "tokenizer.json"]
    (into / "tokenizer.json").write_text("damaged")
    assert (fetch_tokenizer(store, into) / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    damage(location, "0.0/tokenizer.json", b'{"t": 2}')
    with pytest.raises(DataLoss, match=r"tokenizer\.json"):
        fetch_tokenizer(store, tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["config.json"]
