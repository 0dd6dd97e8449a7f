"""Backup and restore of a store: whole versions, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.contract.artifacts.stores import damage, make_source

from honed.artifacts.draft import VersionDraft
from honed.artifacts.manifest import Lineage
from honed.artifacts.marks import Mark
from honed.artifacts.mirror import Mirrored, mirror
from honed.artifacts.promotions import Promoted, PromotionRecord, PromotionState
from honed.artifacts.reward_models import RewardModelStore
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.kit.errors import Conflict, DataLoss, InvalidArgument, NotFound

BASE, FIRST, SECOND = VersionId(0, 0), VersionId(1, 1), VersionId(1, 2)
PROMOTED = PromotionState(1, {"people": Promoted("artifact:trained/0.1", "digest", "trained")})


@pytest.fixture
def backup(tmp_path: Path) -> str:
    return str(tmp_path / "backup")


@pytest.fixture
def store(location: str, tmp_path: Path) -> PolicyStore:
    """A store with two versions of the policy, a reward model, marks and a promotion."""
    store = PolicyStore(location, "demo")
    for number, version in enumerate((BASE, FIRST)):
        publish(store, tmp_path, version, float(number))
    RewardModelStore(location, "demo", "trained").publish_next(make_source(tmp_path / "reward", 7.0), Lineage())
    store.marks.add(FIRST, "promoted", Mark("release", "now"))
    PromotionRecord(location, "demo").write(PROMOTED)
    return store


def publish(store: PolicyStore, folder: Path, version: VersionId, value: float) -> None:
    store.publish(make_source(folder / version.label, value), VersionDraft(version, ()))


def test_a_restored_store_is_the_store(store: PolicyStore, location: str, backup: str, tmp_path: Path) -> None:
    assert mirror(location, backup, "demo") == Mirrored(copied=3)
    restored = str(tmp_path / "restored")
    assert mirror(backup, restored, "demo") == Mirrored(copied=3)
    policies = PolicyStore(restored, "demo")
    assert policies.versions() == [BASE, FIRST]
    assert [policies.manifest(v).digest for v in policies.versions()] == [store.manifest(v).digest for v in store.versions()]
    assert policies.fetch(FIRST, tmp_path / "fetched").name == FIRST.label  # every byte is verified
    assert policies.marks.all("promoted") == {FIRST: Mark("release", "now")}
    assert RewardModelStore(restored, "demo", "trained").latest() == VersionId(0, 1)
    assert PromotionRecord(restored, "demo").read() == PROMOTED


def test_a_second_backup_copies_what_is_new(store: PolicyStore, location: str, backup: str, tmp_path: Path) -> None:
    mirror(location, backup, "demo")
    publish(store, tmp_path, SECOND, 2.0)
    assert mirror(location, backup, "demo") == Mirrored(copied=1, there=3)
    assert mirror(location, backup, "demo") == Mirrored(there=4)


def test_retired_versions_leave_the_backup_only_if_asked(
    store: PolicyStore, location: str, backup: str, tmp_path: Path
) -> None:
    publish(store, tmp_path, SECOND, 2.0)
    mirror(location, backup, "demo")
    store.marks.remove(FIRST, "promoted")
    assert store.retain(1, {BASE}) == [FIRST]
    assert mirror(location, backup, "demo") == Mirrored(there=3)
    assert PolicyStore(backup, "demo").versions() == [BASE, FIRST, SECOND]
    assert mirror(location, backup, "demo", remove=True) == Mirrored(there=3, removed=1)
    assert PolicyStore(backup, "demo").versions() == [BASE, SECOND]
    assert PolicyStore(backup, "demo").marks.all("promoted") == {}


def test_an_empty_original_empties_no_backup(store: PolicyStore, location: str, backup: str, tmp_path: Path) -> None:
    mirror(location, backup, "demo")
    with pytest.raises(NotFound, match="holds no version of run 'demo'"):
        mirror(str(tmp_path / "not-mounted"), backup, "demo", remove=True)
    assert PolicyStore(backup, "demo").versions() == [BASE, FIRST]


def test_a_store_made_anew_after_a_loss_leaves_the_backup_alone(
    store: PolicyStore, location: str, backup: str, tmp_path: Path
) -> None:
    mirror(location, backup, "demo")
    before = [(version, PolicyStore(backup, "demo").manifest(version).digest) for version in (BASE, FIRST)]
    anew = PolicyStore(str(tmp_path / "anew"), "demo")
    publish(anew, tmp_path / "anew-source", BASE, 9.0)
    for remove in (True, False):
        with pytest.raises(Conflict, match=r"anew and .*backup hold different versions 0\.0 .*restore it from .*backup"):
            mirror(str(tmp_path / "anew"), backup, "demo", remove=remove)
    kept = PolicyStore(backup, "demo")
    assert [(version, kept.manifest(version).digest) for version in kept.versions()] == before
    assert kept.marks.all("promoted") == {FIRST: Mark("release", "now")}
    assert RewardModelStore(backup, "demo", "trained").versions() == [VersionId(0, 1)]
    with pytest.raises(Conflict):
        mirror(backup, str(tmp_path / "anew"), "demo")
    assert anew.versions() == [BASE]


def test_stores_without_a_common_version_are_not_mixed(store: PolicyStore, location: str, backup: str, tmp_path: Path) -> None:
    mirror(location, backup, "demo")
    publish(PolicyStore(str(tmp_path / "other"), "demo"), tmp_path, SECOND, 2.0)
    with pytest.raises(Conflict, match="no version in common below demo"):
        mirror(str(tmp_path / "other"), backup, "demo", remove=True)
    assert PolicyStore(backup, "demo").versions() == [BASE, FIRST]


def test_a_reward_model_may_have_outlived_all_that_the_backup_holds_of_it(
    store: PolicyStore, location: str, backup: str, tmp_path: Path
) -> None:
    mirror(location, backup, "demo")
    trained = RewardModelStore(location, "demo", "trained")
    trained.publish_next(make_source(tmp_path / "newer", 8.0), Lineage())
    assert trained.retire(1, ()) == [VersionId(0, 1)]
    assert mirror(location, backup, "demo", remove=True) == Mirrored(copied=1, there=2, removed=1)
    assert RewardModelStore(backup, "demo", "trained").versions() == [VersionId(0, 2)]


def test_a_reward_model_of_the_same_label_and_other_content_is_refused_before_anything_is_copied(
    store: PolicyStore, location: str, backup: str, tmp_path: Path
) -> None:
    mirror(location, backup, "demo")
    publish(store, tmp_path, SECOND, 2.0)
    damage(location, "reward-models/trained/0.1/manifest.json", None)
    RewardModelStore(location, "demo", "trained").publish_next(make_source(tmp_path / "newer", 8.0), Lineage())
    with pytest.raises(Conflict, match=r"different versions 0\.1 .*below demo/reward-models/trained"):
        mirror(location, backup, "demo", remove=True)
    assert PolicyStore(backup, "demo").versions() == [BASE, FIRST]


def test_a_reward_model_that_lost_every_version_keeps_those_of_its_backup(
    store: PolicyStore, location: str, backup: str
) -> None:
    mirror(location, backup, "demo")
    damage(location, "reward-models/trained/0.1/manifest.json", None)
    assert mirror(location, backup, "demo", remove=True) == Mirrored(there=2)
    assert RewardModelStore(backup, "demo", "trained").versions() == [VersionId(0, 1)]


def test_a_restore_adds_and_changes_nothing_that_lives(store: PolicyStore, location: str, backup: str, tmp_path: Path) -> None:
    mirror(location, backup, "demo")
    damage(location, "1.1/manifest.json", None)  # lost
    newer = PromotionState(2, {"people": Promoted("artifact:trained/0.2", "digest", "trained")})
    PromotionRecord(location, "demo").write(newer)
    store.marks.add(FIRST, "promoted", Mark("release", "later"))
    PolicyStore(backup, "demo").marks.add(FIRST, "quarantined", Mark("canaries", "now"))
    assert mirror(backup, location, "demo", restore=True) == Mirrored(copied=1, there=2)
    assert store.versions() == [BASE, FIRST]
    assert PromotionRecord(location, "demo").read() == newer
    assert store.marks.all("promoted") == {FIRST: Mark("release", "later")}
    assert store.marks.all("quarantined") == {FIRST: Mark("canaries", "now")}
    with pytest.raises(InvalidArgument, match="a restore removes nothing"):
        mirror(backup, location, "demo", restore=True, remove=True)


def test_damage_is_not_copied_over_what_is_whole(store: PolicyStore, location: str, backup: str, tmp_path: Path) -> None:
    mirror(location, backup, "demo")
    publish(store, tmp_path, SECOND, 2.0)
    damage(location, "1.2/model.safetensors", b"rotten")
    with pytest.raises(DataLoss, match=r"1\.2: model\.safetensors"):
        mirror(location, backup, "demo")
    assert PolicyStore(backup, "demo").versions() == [BASE, FIRST]


def test_a_copy_that_was_broken_off_is_made_whole(store: PolicyStore, location: str, backup: str) -> None:
    mirror(location, backup, "demo")
    damage(backup, "1.1/manifest.json", None)
    damage(backup, "1.1/model.safetensors", b"half")
    assert PolicyStore(backup, "demo").versions() == [BASE]
    assert mirror(location, backup, "demo") == Mirrored(copied=1, there=2)
    PolicyStore(backup, "demo").check(FIRST)
