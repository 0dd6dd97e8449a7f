"""What a policy version consists of, as one JSON document that is written last and digested.

Invariants: a manifest's bytes are a function of its content (sorted keys, fixed separators), so both sides of a push can
name it by sha256; every path in it stays inside the version's directory and names neither code nor a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from honed.artifacts.fields import Fields
from honed.artifacts.version import VersionId
from honed.kit.errors import DataLoss, HonedError, InvalidArgument, Unimplemented

MANIFEST_NAME = "manifest.json"
MANIFEST_MAX_BYTES = 64 << 20
SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".md"})
"""What a version may hold: data and weights. No Python source, no pickle formats."""

_RUN = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the version: path relative to its directory with `/`, size in bytes, sha256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its name in the model, safetensors dtype (`F32`, `BF16`, ...), shape, and the file that holds it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True, slots=True)
class Canary:
    """A text whose log-probabilities tell whether an engine serves these weights.

    Attributes:
        token_ids: Prompt and continuation.
        start: Index of the continuation's first token; at least 1.
        logprobs: `logprobs[i]` is the learner's float32 log-probability (nats, temperature 1) of token `start + i` given
            everything before it. Covers the continuation to its end.
    """

    token_ids: tuple[int, ...]
    start: int
    logprobs: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuses what no engine could check."""
        if not 1 <= self.start < len(self.token_ids):
            raise InvalidArgument("canary.start", f"{self.start} is not inside 1..{len(self.token_ids) - 1}")
        if self.start + len(self.logprobs) != len(self.token_ids):
            raise InvalidArgument(
                "canary.logprobs",
                f"{len(self.logprobs)} values for {len(self.token_ids) - self.start} tokens from start {self.start}",
            )
        if not all(math.isfinite(value) and value <= 1e-3 for value in self.logprobs):
            raise InvalidArgument("canary.logprobs", "every value must be finite and at most 0")


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where the version's training data came from; the fields of honed.v1.Lineage. `created_at` is ISO 8601, UTC."""

    parent: str = ""
    config_hash: str = ""
    reward_model_version: str = ""
    preference_snapshot: str = ""
    first_entry: str = ""
    last_entry: str = ""
    created_at: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is known of a version. `base` names the version that a delta applies to; None is a full version."""

    SCHEMA: ClassVar[int] = 1

    run: str
    version: VersionId
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    canaries: tuple[Canary, ...]
    tokenizer_sha256: str
    chat_template: str = ""
    lineage: Lineage = field(default_factory=Lineage)
    base: str | None = None

    @property
    def total_bytes(self) -> int:
        """Size of all files without the manifest."""
        return sum(entry.bytes for entry in self.files)

    @property
    def digest(self) -> str:
        """sha256 of the manifest's bytes, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The canonical JSON form."""
        document = {
            "schema": self.SCHEMA,
            "run": self.run,
            "version": self.version.label,
            "base": self.base,
            "files": [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in self.files],
            "tensors": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "file": t.file} for t in self.tensors],
            "canaries": [
                {"token_ids": list(c.token_ids), "start": c.start, "logprobs": list(c.logprobs)} for c in self.canaries
            ],
            "tokenizer_sha256": self.tokenizer_sha256,
            "chat_template": self.chat_template,
            "lineage": {name: getattr(self.lineage, name) for name in Lineage.__dataclass_fields__},
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Reads a manifest strictly: each field present, of its type, and none that is unknown.

        Raises:
            DataLoss: If the bytes are not a manifest; the message names the field.
            Unimplemented: If the manifest is a delta or of a newer schema.
        """
        try:
            document = json.loads(data)
        except ValueError as error:
            raise DataLoss(f"{MANIFEST_NAME} is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise DataLoss(f"{MANIFEST_NAME} is not a JSON object")
        if document.get("schema") != cls.SCHEMA:
            raise Unimplemented(
                f"{MANIFEST_NAME}: schema {document.get('schema')!r} is not {cls.SCHEMA}, the one that this build reads"
            )
        try:
            return cls._parse(document)
        except (DataLoss, Unimplemented):
            raise
        except HonedError as error:
            raise DataLoss(f"{MANIFEST_NAME}: {error}") from error

    @classmethod
    def _parse(cls, document: Mapping[str, Any]) -> Self:
        top = Fields(document, "")
        top.integer("schema")
        base = top.optional_text("base")
        if base is not None:
            raise Unimplemented(f"{MANIFEST_NAME}: a delta on {base}; this build reads full versions only")
        manifest = cls(
            run=top.text("run", _RUN),
            version=VersionId.parse(top.text("version")),
            files=tuple(_file(entry) for entry in top.objects("files")),
            tensors=tuple(_tensor(entry) for entry in top.objects("tensors")),
            canaries=tuple(_canary(entry) for entry in top.objects("canaries")),
            tokenizer_sha256=top.text("tokenizer_sha256", _SHA256),
            chat_template=top.text("chat_template"),
            lineage=_lineage(top.object("lineage")),
            base=None,
        )
        top.done()
        paths = [entry.path for entry in manifest.files]
        if len(set(paths)) != len(paths):
            raise InvalidArgument("files", "a path is listed twice")
        for index, tensor in enumerate(manifest.tensors):
            if tensor.file not in paths:
                raise InvalidArgument(f"tensors[{index}].file", f"{tensor.file!r} is not among the files")
        return manifest


def check_run(run: str) -> str:
    """Returns `run` if it may name a directory.

    Raises:
        InvalidArgument: If it is not lower-case letters, digits and hyphens, at most 64.
    """
    if _RUN.fullmatch(run) is None:
        raise InvalidArgument("run", f"{run!r} must be lower-case letters, digits and hyphens, at most 64, no leading hyphen")
    return run


def check_path(path: str, where: str = "path") -> str:
    """Returns `path` if it stays inside its directory and is of a kind that a version may hold.

    Raises:
        InvalidArgument: If it is absolute, climbs out, hides, or has a suffix outside `SUFFIXES`.
    """
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in {"", ".."} or part.startswith(".") for part in parts):
        raise InvalidArgument(where, f"{path!r} is not a plain relative path inside the version's directory")
    if path == MANIFEST_NAME:
        raise InvalidArgument(where, f"{MANIFEST_NAME} cannot list itself")
    suffix = "." + parts[-1].rpartition(".")[2]
    if suffix not in SUFFIXES:
        raise InvalidArgument(where, f"{path!r}: a version holds only {', '.join(sorted(SUFFIXES))} files")
    return path


def _file(fields: Fields) -> FileEntry:
    entry = FileEntry(
        path=check_path(fields.text("path"), fields.name("path")),
        bytes=fields.integer("bytes"),
        sha256=fields.text("sha256", _SHA256),
    )
    fields.done()
    return entry


def _tensor(fields: Fields) -> TensorEntry:
    entry = TensorEntry(
        name=fields.text("name"), dtype=fields.text("dtype"), shape=fields.integers("shape"), file=fields.text("file")
    )
    fields.done()
    return entry


def _canary(fields: Fields) -> Canary:
    canary = Canary(token_ids=fields.integers("token_ids"), start=fields.integer("start"), logprobs=fields.numbers("logprobs"))
    fields.done()
    return canary


def _lineage(fields: Fields) -> Lineage:
    lineage = Lineage(**{name: fields.text(name) for name in Lineage.__dataclass_fields__})
    fields.done()
    return lineage
