"""Claims about the policy store, on a local directory and on an object store by URL."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tests.contract.artifacts.stores import damage, make_source

from honed.artifacts.draft import VersionDraft
from honed.artifacts.files import RemoteBackend, StoreFull
from honed.artifacts.manifest import Canary, Lineage
from honed.artifacts.marks import Mark
from honed.artifacts.store import PolicyStore
from honed.artifacts.verify import verify_directory
from honed.artifacts.version import VersionId
from honed.kit.errors import Conflict, DataLoss, InvalidArgument, NotFound, Unavailable

V1, V2, V3, V4 = (VersionId(1, step) for step in range(1, 5))
CANARY = Canary((5, 6, 7), 1, (-0.5, -1.5))


@pytest.fixture
def store(location: str) -> PolicyStore:
    return PolicyStore(location, "demo")


def draft(version: VersionId, created_at: str = "now") -> VersionDraft:
    return VersionDraft(version, (CANARY,), Lineage(parent="1.0", created_at=created_at))


def test_what_was_published_is_fetched_and_is_a_model_directory(store: PolicyStore, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", 1.0)
    manifest = store.publish(source, draft(V1))
    assert [(t.name, t.dtype, t.shape) for t in manifest.tensors] == [("a", "F32", (3, 4)), ("b", "F16", (5,))]
    fetched = store.fetch(V1, tmp_path / "cache", manifest.digest)
    assert fetched == tmp_path / "cache" / "1.1"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (fetched / name).read_bytes() == (source / name).read_bytes()
    assert store.manifest(V1) == manifest == verify_directory(fetched)


def test_versions_are_listed_in_order_and_the_latest_is_the_last(store: PolicyStore, tmp_path: Path) -> None:
    assert store.versions() == []
    assert store.latest() is None
    source = make_source(tmp_path / "source")
    for version in (VersionId(2, 0), VersionId(1, 10), VersionId(1, 9)):
        store.publish(source, draft(version))
    assert store.versions() == [VersionId(1, 9), VersionId(1, 10), VersionId(2, 0)]
    assert store.latest() == VersionId(2, 0)


def test_publishing_again_is_idempotent_and_other_content_is_refused(store: PolicyStore, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    first = store.publish(source, draft(V1))
    assert store.publish(source, draft(V1, created_at="later")) == first
    with pytest.raises(Conflict):
        store.publish(make_source(tmp_path / "other", 2.0), draft(V1))
    assert store.manifest(V1) == first


def test_a_version_without_its_manifest_does_not_exist(store: PolicyStore, location: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    store.publish(source, draft(V1))
    store.publish(source, draft(V2))
    damage(location, "1.2/manifest.json", None)
    assert store.versions() == [V1]
    assert store.latest() == V1
    with pytest.raises(NotFound):
        store.fetch(V2, tmp_path / "cache")
    store.publish(make_source(tmp_path / "other", 3.0), draft(V2))  # the remains do not stand in the way
    assert store.latest() == V2
    store.fetch(V2, tmp_path / "cache")


@pytest.mark.parametrize(
    ("path", "data", "says"),
    [
        ("1.1/model.safetensors", b"short", "model.safetensors"),
        ("1.1/config.json", b"{]", "sha256"),
        ("1.1/tokenizer.json", None, "tokenizer.json is missing"),
        ("1.1/manifest.json", b"{", "not JSON"),
    ],
)
def test_a_damaged_version_is_refused_with_the_reason_and_leaves_nothing(
    store: PolicyStore, location: str, tmp_path: Path, path: str, data: bytes | None, says: str
) -> None:
    store.publish(make_source(tmp_path / "source"), draft(V1))
    damage(location, path, data)
    with pytest.raises(DataLoss, match=says):
        store.fetch(V1, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("**/*")) == []


def test_a_mark_of_the_next_release_is_read_without_what_is_new(store: PolicyStore, location: str) -> None:
    store.marks.add(V1, "quarantined", Mark("why", "now"))
    damage(location, "marks/1.1.quarantined.json", b'{"reason": "why", "at": "now", "zz_newer": 1}')
    assert store.marks.all("quarantined") == {V1: Mark("why", "now")}
    for broken in (b'{"reason": "why"}', b"[]", b'"why"'):
        damage(location, "marks/1.1.quarantined.json", broken)
        with pytest.raises(DataLoss, match="cannot be read"):
            store.marks.get(V1, "quarantined")


def test_an_edited_manifest_is_refused(store: PolicyStore, location: str, tmp_path: Path) -> None:
    manifest = store.publish(make_source(tmp_path / "source"), draft(V1))
    damage(location, "1.1/manifest.json", json.dumps(json.loads(manifest.to_bytes()), indent=1).encode())
    with pytest.raises(DataLoss, match="edited"):
        store.fetch(V1, tmp_path / "cache")


def test_a_version_in_another_versions_place_is_refused(store: PolicyStore, location: str, tmp_path: Path) -> None:
    manifest = store.publish(make_source(tmp_path / "source"), draft(V1))
    store.publish(make_source(tmp_path / "source"), draft(V2))
    damage(location, "1.2/manifest.json", manifest.to_bytes())
    with pytest.raises(DataLoss, match="belongs"):
        store.fetch(V2, tmp_path / "cache")


def test_a_manifest_whose_paths_escape_is_refused(store: PolicyStore, location: str, tmp_path: Path) -> None:
    manifest = store.publish(make_source(tmp_path / "source"), draft(V1))
    document = json.loads(manifest.to_bytes())
    document["files"][0]["path"] = "../../escaped.json"
    damage(location, "1.1/manifest.json", json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    with pytest.raises(DataLoss, match=r"files\[0\].path"):
        store.fetch(V1, tmp_path / "cache")
    assert not list(tmp_path.glob("**/escaped.json"))


def test_the_wrong_manifest_is_refused(store: PolicyStore, tmp_path: Path) -> None:
    store.publish(make_source(tmp_path / "source"), draft(V1))
    with pytest.raises(DataLoss, match="caller expects"):
        store.fetch(V1, tmp_path / "cache", "0" * 64)


def test_a_fetched_copy_is_reused_and_a_damaged_one_is_replaced(store: PolicyStore, location: str, tmp_path: Path) -> None:
    store.publish(make_source(tmp_path / "source"), draft(V1))
    fetched = store.fetch(V1, tmp_path / "cache")
    inode = (fetched / "config.json").stat().st_ino
    assert store.fetch(V1, tmp_path / "cache") == fetched
    assert (fetched / "config.json").stat().st_ino == inode
    (fetched / "config.json").write_text("[]")
    (fetched / "stray.json").write_text("{}")
    store.fetch(V1, tmp_path / "cache")
    assert (fetched / "config.json").read_text() == "{}"
    assert not (fetched / "stray.json").exists()


def test_retention_keeps_the_newest_and_the_named(store: PolicyStore, location: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    for version in (V1, V2, V3, V4):
        store.publish(source, draft(version))
    assert store.retain(1, {V1}) == [V2, V3]
    assert store.versions() == [V1, V4]
    assert sorted(store._backend.list_names(store._root)) == ["1.1", "1.4"]
    store.publish(source, draft(VersionId(1, 5)))
    damage(location, "1.4/manifest.json", None)  # a removal that died half-way
    store.retain(2)
    assert sorted(store._backend.list_names(store._root)) == ["1.1", "1.5"]


def test_what_a_version_may_not_hold_is_not_published(store: PolicyStore, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InvalidArgument, match=r"pytorch_model\.bin"):
        store.publish(source, draft(V1))
    (source / "pytorch_model.bin").unlink()
    (source / "tokenizer.json").unlink()
    with pytest.raises(InvalidArgument, match=r"tokenizer\.json"):
        store.publish(source, draft(V1))
    assert store.versions() == []


@pytest.mark.parametrize("cut", [4, 20, -3])
def test_a_truncated_tensor_file_is_not_published(store: PolicyStore, tmp_path: Path, cut: int) -> None:
    source = make_source(tmp_path / "source")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:cut])
    with pytest.raises(DataLoss, match="safetensors"):
        store.publish(source, draft(V1))
    assert store.versions() == []


def test_a_full_disk_says_so_and_keeps_the_older_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PolicyStore(tmp_path / "store", "demo")
    source = make_source(tmp_path / "source")
    store.publish(source, draft(V1))
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # in the middle of the second file
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFull) as error:
        store.publish(source, draft(V2))
    monkeypatch.undo()
    needed = sum(path.stat().st_size for path in source.iterdir())
    assert f"{needed} bytes" in str(error.value)
    assert "1.2" in str(error.value)
    assert store.versions() == [V1]
    assert not (tmp_path / "store" / "demo" / "1.2").exists()
    store.fetch(V1, tmp_path / "cache")


def test_a_full_cache_disk_leaves_no_partial_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PolicyStore(tmp_path / "store", "demo")
    store.publish(make_source(tmp_path / "source"), draft(V1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(StoreFull, match="cache"):
        store.fetch(V1, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_store_that_does_not_answer_is_unavailable_not_a_hang(tmp_path: Path) -> None:
    release = threading.Event()

    class Silent:
        def cat_file(self, *_: Any) -> bytes:
            release.wait(60)
            return b""

    backend = RemoteBackend(Silent(), "bucket", io_timeout_s=0.05)
    with pytest.raises(Unavailable, match="bucket/x"):
        backend.read("bucket/x", 10)
    release.set()


def test_whatever_a_remote_store_raises_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each library under fsspec has errors of its own, which are no OSError: they ended the learner and the generators."""
    store = PolicyStore(f"memory://honed-{tmp_path.name}", "demo")
    source = make_source(tmp_path / "source")
    store.publish(source, draft(V1))

    class ClientError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ClientError("ExpiredToken")

    with monkeypatch.context() as patched:
        for operation in ("makedirs", "open", "pipe_file", "cat_file", "exists", "ls", "rm_file", "rm"):
            patched.setattr(type(fsspec.filesystem("memory")), operation, fail)
        for call in (
            lambda: store.publish(source, draft(V2)),
            lambda: store.fetch(V1, tmp_path / "cache"),
            lambda: store.retain(1),
            store.latest,
            store.servable,
            lambda: store.marks.add(V1, "quarantined", Mark("why", "now")),
        ):
            with pytest.raises(Unavailable, match="ClientError: ExpiredToken"):
                call()
    store.fetch(V1, tmp_path / "cache")
    fsspec.filesystem("memory").store.clear()


def test_a_fetch_that_comes_second_finds_the_copy_of_the_first(
    store: PolicyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is given up leaves its thread fetching; the next one met its directory and died of ENOTEMPTY."""
    store.publish(make_source(tmp_path / "source"), draft(V1))
    real = Path.rename
    first: list[Path] = []

    def overtaken(path: Path, target: Path) -> Path:
        if path.is_dir() and not first:
            first.append(path)
            store.fetch(V1, tmp_path / "cache")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    assert store.fetch(V1, tmp_path / "cache") == tmp_path / "cache" / "1.1"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["1.1"]


def test_an_unknown_protocol_and_a_bad_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="nothing://"):
        PolicyStore("nothing://bucket", "demo")
    with pytest.raises(InvalidArgument, match="run"):
        PolicyStore(tmp_path, "../demo")


def test_a_quarantined_version_is_never_offered_for_serving(store: PolicyStore, tmp_path: Path) -> None:
    for version in (V1, V2, V3):
        store.publish(make_source(tmp_path / "source", version.step), draft(version))
    store.marks.add(V3, "quarantined", Mark("canaries off by 1 nat", "now"))
    assert store.servable() == [V2, V1]
    assert store.latest() == V3  # it stands, for whoever looks for the cause
    assert store.marks.all("quarantined") == {V3: Mark("canaries off by 1 nat", "now")}
    store.marks.remove(V3, "quarantined")
    assert store.servable() == [V3, V2, V1]


def test_retention_never_removes_a_promoted_version(store: PolicyStore, tmp_path: Path) -> None:
    for version in (V1, V2, V3, V4):
        store.publish(make_source(tmp_path / "source", version.step), draft(version))
    store.marks.add(V1, "promoted", Mark("release", "now"))
    assert store.retain(1) == [V2, V3]
    assert store.versions() == [V1, V4]


def test_quarantined_versions_push_no_good_one_out(store: PolicyStore, tmp_path: Path) -> None:
    for version in (V1, V2, V3, V4):
        store.publish(make_source(tmp_path / "source", version.step), draft(version))
    for version in (V3, V4):
        store.marks.add(version, "quarantined", Mark("canaries off by 1 nat", "now"))
    assert store.retain(1) == [V1, V3, V4]
    assert store.servable() == [V2]


def test_marks_go_when_the_newest_versions_have_left_theirs_behind(store: PolicyStore, tmp_path: Path) -> None:
    """Marks of versions that were gone stayed, and each start of a generator read them all."""
    for version in (V1, V2, V3, V4):
        store.publish(make_source(tmp_path / "source", version.step), draft(version))
    for version in (VersionId(0, 9), V3, VersionId(2, 1)):
        store.marks.add(version, "quarantined", Mark("canaries off by 1 nat", "now"))
    store.marks.add(V1, "promoted", Mark("release", "now"))
    assert store.retain(2) == [V3]
    assert list(store.marks.all("promoted")) == [V1]
    assert set(store.marks.all("quarantined")) == {V3, VersionId(2, 1)}
    store.publish(make_source(tmp_path / "source", 5), draft(VersionId(1, 5)))
    assert store.retain(2) == [V2]
    assert set(store.marks.all("quarantined")) == {VersionId(2, 1)}


def test_the_bytes_of_a_version_are_checked_where_they_stand(store: PolicyStore, location: str, tmp_path: Path) -> None:
    manifest = store.publish(make_source(tmp_path / "source"), draft(V1))
    assert store.check(V1) == manifest
    damage(location, "1.1/config.json", b"[]")
    with pytest.raises(DataLoss, match=r"config\.json: sha256"):
        store.check(V1)
    with pytest.raises(NotFound):
        store.check(V2)


def test_a_damaged_mark_is_an_error_that_names_it(store: PolicyStore, location: str) -> None:
    store.marks.add(V1, "quarantined", Mark("why", "now"))
    damage(location, "marks/1.1.quarantined.json", b"{")
    with pytest.raises(DataLoss, match=r"1\.1\.quarantined\.json"):
        store.servable()
