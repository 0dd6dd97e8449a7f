"""Claims about which refusals of one generator become marks for all, on a store of files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.artifacts.stores import damage, make_source
from tests.support.engine import FakeEngine
from tests.unit.artifacts.test_manifest import of_the_next_release

from honed.artifacts.draft import VersionDraft
from honed.artifacts.manifest import Canary
from honed.artifacts.marks import Mark
from honed.artifacts.store import PolicyStore
from honed.artifacts.verify import verify_directory
from honed.artifacts.version import VersionId
from honed.generation.control import GenerationControlService
from honed.generation.frontend import RequestLimits, SamplingFrontend
from honed.generation.gate import RequestGate
from honed.generation.quarantine import fetch_or_mark, mark_disagreeing
from honed.kit.errors import DataLoss, FailedPrecondition, NotFound, Unavailable
from honed.learner.loop.push import REFUSALS

V1, V2, V3 = (VersionId(1, step) for step in (1, 2, 3))


@pytest.fixture
def store(tmp_path: Path) -> PolicyStore:
    store = PolicyStore(tmp_path / "store", "demo")
    for version in (V1, V2, V3):
        store.publish(make_source(tmp_path / "source"), VersionDraft(version, (Canary((5, 6), 1, (-0.5,)),)))
    return store


@pytest.fixture
def control(store: PolicyStore, tmp_path: Path) -> GenerationControlService:
    gate = RequestGate(8, 20, application_share=0.75)
    limits = RequestLimits(max_samples=4, max_tokens=64, default_max_tokens=8, max_prompt_tokens=2000)
    return GenerationControlService(SamplingFrontend(FakeEngine(gate, V1), gate, limits, "demo"), store, tmp_path / "versions")


def quarantined(store: PolicyStore) -> dict[VersionId, str]:
    return {version: mark.reason for version, mark in store.marks.all("quarantined").items()}


def test_a_version_that_is_damaged_in_the_store_is_tried_once_by_anybody(store: PolicyStore, tmp_path: Path) -> None:
    """Each start of each generator fetched it, found it damaged and went on to the next, and nobody knew."""
    damage(str(tmp_path / "store"), "1.3/config.json", b"[]")
    with pytest.raises(DataLoss, match=r"config\.json"):
        fetch_or_mark(store, V3, tmp_path / "cache")
    assert list(quarantined(store)) == [V3]
    assert "damaged in the store: version 1.3: config.json: sha256" in quarantined(store)[V3]
    assert store.servable() == [V2, V1]


def test_a_version_of_a_learner_one_release_ahead_is_fetched(store: PolicyStore, tmp_path: Path) -> None:
    data = of_the_next_release(store.manifest(V3))
    damage(str(tmp_path / "store"), "1.3/manifest.json", data)
    for _ in range(2):  # the second time it is there
        fetched = fetch_or_mark(store, V3, tmp_path / "cache", hashlib.sha256(data).hexdigest())
        assert (fetched / "manifest.json").read_bytes() == data
    assert verify_directory(fetched).digest == store.manifest(V3).digest == hashlib.sha256(data).hexdigest()
    assert quarantined(store) == {}


def test_a_manifest_that_this_build_cannot_read_is_no_damage(store: PolicyStore, tmp_path: Path) -> None:
    """Generators of a newer build serve it; a mark would take it from them too, and have the learner roll back."""
    document = json.loads(store.manifest(V3).to_bytes()) | {"schema": 2}
    damage(str(tmp_path / "store"), "1.3/manifest.json", json.dumps(document).encode())
    with pytest.raises(FailedPrecondition, match="schema 2; this build cannot read it") as refused:
        fetch_or_mark(store, V3, tmp_path / "cache")
    assert refused.value.code not in REFUSALS
    assert quarantined(store) == {}


def test_what_only_one_caller_finds_wrong_marks_nothing(
    store: PolicyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataLoss, match="caller expects"):
        fetch_or_mark(store, V3, tmp_path / "cache", "0" * 64)
    real = store._backend.chunks

    def once(path: str, size: int) -> Iterator[bytes]:
        monkeypatch.undo()
        list(real(path, size))
        yield b"damaged on the way"

    monkeypatch.setattr(store._backend, "chunks", once)
    with pytest.raises(DataLoss):
        fetch_or_mark(store, V3, tmp_path / "cache")
    assert quarantined(store) == {}


def test_a_version_that_retention_removes_meanwhile_is_gone_and_not_damaged(
    store: PolicyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store._backend.chunks

    def removed(path: str, size: int) -> Iterator[bytes]:
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "store" / "demo" / "1.3")
        yield from real(path, size)

    monkeypatch.setattr(store._backend, "chunks", removed)
    with pytest.raises(NotFound):
        fetch_or_mark(store, V3, tmp_path / "cache")
    assert quarantined(store) == {}


def test_a_store_that_cannot_be_written_changes_no_error(
    store: PolicyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> None:
        raise OSError("read-only")

    damage(str(tmp_path / "store"), "1.3/config.json", b"[]")
    monkeypatch.setattr(store._backend, "write", read_only)
    with pytest.raises(DataLoss):
        fetch_or_mark(store, V3, tmp_path / "cache")


@pytest.mark.parametrize(("committed", "marked"), [(V2, [V3]), (V1, [V2, V3]), (V3, []), (VersionId(2, 1), []), (None, [])])
def test_canaries_condemn_only_what_no_generator_has_committed(
    store: PolicyStore, committed: VersionId | None, marked: list[VersionId]
) -> None:
    mark_disagreeing(store, {V3: "the canaries are off", V2: "the canaries are off"}, committed)
    assert sorted(quarantined(store)) == marked


async def test_a_quarantined_version_is_not_fetched_to_catch_up(
    store: PolicyStore, control: GenerationControlService, tmp_path: Path
) -> None:
    store.marks.add(V3, "quarantined", Mark("canaries off by 1 nat", "yesterday"))
    with pytest.raises(FailedPrecondition, match="quarantined since yesterday: canaries off by 1 nat"):
        await control.change(V3, "")
    assert not (tmp_path / "versions").exists()
    await control.change(V2, "")
    assert control.version == V2


async def test_a_copy_that_this_host_damages_is_no_refusal_of_the_version(
    store: PolicyStore, control: GenerationControlService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner quarantines what is answered with DATA_LOSS."""

    async def prepare(version: VersionId, directory: Path) -> None:
        raise DataLoss(f"{directory} is damaged")

    monkeypatch.setattr(control._engine, "prepare", prepare)
    with pytest.raises(Unavailable, match="on this host was damaged"):
        await control.change(V3, "")
    assert not (tmp_path / "versions" / "1.3").exists(), "the next try fetches it anew"
    assert quarantined(store) == {}
