"""Claims about the manifest's form."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from honed.artifacts.manifest import Canary, FileEntry, Lineage, Manifest, TensorEntry
from honed.artifacts.names import check_path
from honed.artifacts.version import VersionId
from honed.kit.errors import DataLoss, FailedPrecondition, InvalidArgument

SHA = "0" * 64
MANIFEST = Manifest(
    run="demo",
    version=VersionId(1, 2),
    files=(FileEntry("model.safetensors", 10, SHA), FileEntry("tokenizer.json", 3, SHA)),
    tensors=(TensorEntry("w", "F32", (2, 3), "model.safetensors"),),
    canaries=(Canary((1, 2, 3), 1, (-0.1, -2.5)),),
    tokenizer_sha256=SHA,
    chat_template="{{ x }}",
    lineage=Lineage(parent="1.1", created_at="2026-01-01T00:00:00+00:00"),
)


def test_a_manifest_survives_its_bytes() -> None:
    read = Manifest.from_bytes(MANIFEST.to_bytes())
    assert read == MANIFEST
    assert read.digest == MANIFEST.digest
    assert read.total_bytes == 13


def test_what_a_newer_build_adds_leaves_the_bytes_of_an_older_manifest_as_they_were() -> None:
    document = json.loads(MANIFEST.to_bytes())
    assert not {"kind", "name"} & document.keys()
    assert sorted(document["lineage"]) == [
        "config_hash", "created_at", "first_entry", "last_entry", "parent", "preference_snapshot", "reward_model_version",
    ]  # fmt: skip
    assert MANIFEST.digest == "41c38684ef0cf1e5c8817dd14a3411733f7538f3f85af69864c2674ad2c2b3a4"


def test_a_reward_models_manifest_says_what_it_is_and_how_good() -> None:
    lineage = Lineage(preference_snapshot="s", figures={"agreement": 0.74})
    manifest = replace(MANIFEST, kind="reward-model", name="trained", canaries=(), lineage=lineage)
    read = Manifest.from_bytes(manifest.to_bytes())
    assert read == manifest
    assert read.lineage.figures == {"agreement": 0.74}
    with pytest.raises(InvalidArgument, match=r"lineage\.figures\.agreement"):
        Lineage(figures={"agreement": float("nan")})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("tensors"), "tensors: missing"),
        (lambda d: d.pop("schema"), "schema: missing"),
        (lambda d: d.update(schema="2"), "schema: must be an integer"),
        (lambda d: d.update(schema=True), "schema: must be an integer"),
        (lambda d: d["files"][0].update(bytes="10"), "files[0].bytes"),
        (lambda d: d["files"][0].update(bytes=True), "files[0].bytes"),
        (lambda d: d["files"][1].update(sha256="xyz"), "files[1].sha256"),
        (lambda d: d["files"].append(d["files"][0]), "twice"),
        (lambda d: d["tensors"][0].update(file="other.safetensors"), "tensors[0].file"),
        (lambda d: d["tensors"][0].update(shape=[2, -3]), "tensors[0].shape[1]"),
        (lambda d: d["canaries"][0].update(start=0), "canary.start"),
        (lambda d: d["canaries"][0].update(logprobs=[-1.0]), "canary.logprobs"),
        (lambda d: d["canaries"][0].update(logprobs=[-1.0, 3.0]), "canary.logprobs"),
        (lambda d: d["lineage"].pop("parent"), "lineage.parent: missing"),
        (lambda d: d.update(run="../x"), "run"),
        (lambda d: d.update(version="one"), "version"),
        (lambda d: d.update(files={}), "files"),
        (lambda d: d.update(kind="other", name="x"), "kind"),
        (lambda d: d.update(kind="reward-model"), "name: missing"),
        (lambda d: d.update(kind="reward-model", name="../x"), "name"),
        (lambda d: d["lineage"].update(figures=[1]), "lineage.figures"),
        (lambda d: d["lineage"].update(figures={"a": "b"}), "lineage.figures.a"),
    ],
)
def test_a_wrong_field_is_named(change: Callable[[dict[str, Any]], object], says: str) -> None:
    document = json.loads(MANIFEST.to_bytes())
    change(document)
    with pytest.raises(DataLoss) as error:
        Manifest.from_bytes(json.dumps(document).encode())
    assert says in str(error.value)


def of_the_next_release(manifest: Manifest) -> bytes:
    """The bytes of a manifest with one key at each level that this build does not know."""
    document = json.loads(manifest.to_bytes())
    for part in (document, document["files"][0], document["tensors"][0], document["lineage"], *document["canaries"][:1]):
        part["zz_newer"] = {"any": ["thing", 1.5]}
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_keys_of_the_next_release_are_passed_over_and_the_digest_is_that_of_all_bytes() -> None:
    data = of_the_next_release(MANIFEST)
    read = Manifest.from_bytes(data)
    assert read == MANIFEST
    assert (read.to_bytes(), read.digest) == (data, hashlib.sha256(data).hexdigest())
    assert read.is_canonical
    assert replace(read, run="other").to_bytes() == replace(MANIFEST, run="other").to_bytes()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe"])
def test_what_is_not_an_object_is_refused(data: bytes) -> None:
    with pytest.raises(DataLoss):
        Manifest.from_bytes(data)


@pytest.mark.parametrize(("field", "value"), [("base", "1.1"), ("schema", 2)])
def test_what_this_build_cannot_apply_is_refused(field: str, value: object) -> None:
    document = json.loads(MANIFEST.to_bytes()) | {field: value}
    with pytest.raises(FailedPrecondition, match=r"this build .* upgrade this service"):
        Manifest.from_bytes(json.dumps(document).encode())


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd.json", "../x.json", "a/../../x.json", "a//x.json", "a\\..\\x.json", ".hidden.json", "a/.json", "x\0.json",
     "manifest.json", "model.bin", "model.pt", "modeling.py", "noextension"],
)  # fmt: skip
def test_a_path_that_escapes_or_carries_code_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument):
        check_path(path)
    document = json.loads(MANIFEST.to_bytes())
    document["files"][0]["path"] = path
    with pytest.raises(DataLoss):
        Manifest.from_bytes(json.dumps(document).encode())
