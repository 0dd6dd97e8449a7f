"""What a version of a model consists of, as one JSON document that is written last and digested.

Invariants: a manifest's bytes are a function of its content (sorted keys, fixed separators), so both
sides of a push can name it by sha256; every path in it stays inside the version's directory and names
neither code nor a pickle. What a newer build adds is left out where it is empty, so that the bytes of
an older manifest stay what they were. A manifest that was read keeps its bytes, and so its digest, whatever
keys of a newer build it has: a newer learner and an older generator name one version by one digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, Self, cast, get_args

from honed.artifacts.fields import Fields
from honed.artifacts.names import MANIFEST_NAME, NAME, RUN, check_path
from honed.artifacts.version import VersionId
from honed.kit.errors import DataLoss, FailedPrecondition, InvalidArgument

MANIFEST_MAX_BYTES = 64 << 20

Kind = Literal["policy", "reward-model"]
"""What a version is of."""

_KIND: Final = re.compile("|".join(get_args(Kind)))
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
    """Where a version came from; the fields of honed.v1.Lineage, and figures.

    Attributes:
        parent: The version that training started from; for a reward model, of the policy.
        config_hash: Digest of the settings that decide the result; of version 0.0, of all that its base was made of.
        reward_model_version: Of the reward model that scored the batch; for a reward model, its own.
        preference_snapshot: Content hash of the judgements behind the reward model.
        first_entry: First entry of the stream `scored` in the batch.
        last_entry: The last one.
        created_at: ISO 8601, UTC.
        figures: What was measured, by name, such as `agreement` of a reward model.
    """

    parent: str = ""
    config_hash: str = ""
    reward_model_version: str = ""
    preference_snapshot: str = ""
    first_entry: str = ""
    last_entry: str = ""
    created_at: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses figures that JSON cannot hold."""
        for name, value in self.figures.items():
            if not math.isfinite(value):
                raise InvalidArgument(f"lineage.figures.{name}", f"{value} is not finite")


_LINEAGE_TEXTS: Final = tuple(name for name in Lineage.__dataclass_fields__ if name != "figures")


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is known of a version.

    Attributes:
        run: The run that made it.
        version: Its number.
        files: What it consists of.
        tensors: What its safetensors files hold.
        canaries: Of a policy; a reward model has none.
        tokenizer_sha256: Of `tokenizer.json`.
        chat_template: Of the tokenizer; empty if there is none.
        lineage: What it was made from.
        base: The version that a delta applies to; None is a full version.
        kind: What it is.
        name: Of the reward model; empty for a policy, of which a run has one.
    """

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
    kind: Kind = "policy"
    name: str = ""
    _read_from: bytes = field(default=b"", init=False, repr=False, compare=False)

    @property
    def total_bytes(self) -> int:
        """Size of all files without the manifest."""
        return sum(entry.bytes for entry in self.files)

    @property
    def digest(self) -> str:
        """sha256 of the manifest's bytes, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def is_canonical(self) -> bool:
        """Whether its bytes are in the form that honed writes, whichever build did; an edited manifest's are not."""
        data = self.to_bytes()
        try:
            return _canonical(json.loads(data)) == data
        except ValueError:  # NaN under a key that this build does not read
            return False

    def to_bytes(self) -> bytes:
        """The bytes that it was read from, else the canonical JSON form. `dataclasses.replace` forgets those bytes."""
        if self._read_from:
            return self._read_from
        document: dict[str, Any] = {
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
            "lineage": {name: getattr(self.lineage, name) for name in _LINEAGE_TEXTS},
        }
        if self.lineage.figures:
            document["lineage"]["figures"] = dict(self.lineage.figures)
        if self.kind != "policy":
            document |= {"kind": self.kind, "name": self.name}
        return _canonical(document)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Reads a manifest: each field that this build knows is present and of its type.

        Unknown keys are passed over, since a generator may be one minor version behind the learner that wrote them. What a
        build must not overlook has another `schema`.

        Raises:
            DataLoss: If the bytes are not a manifest; the message names the field.
            FailedPrecondition: If it is whole and this build cannot use it: another schema, or a delta.
        """
        try:
            document = json.loads(data)
        except ValueError as error:
            raise DataLoss(f"{MANIFEST_NAME} is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise DataLoss(f"{MANIFEST_NAME} is not a JSON object")
        try:
            manifest = cls._parse(document)
        except InvalidArgument as error:
            raise DataLoss(f"{MANIFEST_NAME}: {error}") from error
        object.__setattr__(manifest, "_read_from", data)
        return manifest

    @classmethod
    def _parse(cls, document: Mapping[str, Any]) -> Self:
        top = Fields(document, "")
        schema = top.integer("schema")
        if schema != cls.SCHEMA:
            raise FailedPrecondition(
                f"{MANIFEST_NAME} has schema {schema}; this build cannot read it, only {cls.SCHEMA}: upgrade this service"
            )
        base = top.optional_text("base")
        if base is not None:
            raise FailedPrecondition(
                f"{MANIFEST_NAME}: a delta on {base}; this build reads full versions only: upgrade this service"
            )
        manifest = cls(
            run=top.text("run", RUN),
            version=VersionId.parse(top.text("version")),
            files=tuple(_file(entry) for entry in top.objects("files")),
            tensors=tuple(_tensor(entry) for entry in top.objects("tensors")),
            canaries=tuple(_canary(entry) for entry in top.objects("canaries")),
            tokenizer_sha256=top.text("tokenizer_sha256", _SHA256),
            chat_template=top.text("chat_template"),
            lineage=_lineage(top.object("lineage")),
            base=None,
            **_kind_and_name(top),
        )
        paths = [entry.path for entry in manifest.files]
        if len(set(paths)) != len(paths):
            raise InvalidArgument("files", "a path is listed twice")
        for index, tensor in enumerate(manifest.tensors):
            if tensor.file not in paths:
                raise InvalidArgument(f"tensors[{index}].file", f"{tensor.file!r} is not among the files")
        return manifest


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _file(fields: Fields) -> FileEntry:
    return FileEntry(
        path=check_path(fields.text("path"), fields.name("path")),
        bytes=fields.integer("bytes"),
        sha256=fields.text("sha256", _SHA256),
    )


def _tensor(fields: Fields) -> TensorEntry:
    return TensorEntry(
        name=fields.text("name"), dtype=fields.text("dtype"), shape=fields.integers("shape"), file=fields.text("file")
    )


def _canary(fields: Fields) -> Canary:
    return Canary(token_ids=fields.integers("token_ids"), start=fields.integer("start"), logprobs=fields.numbers("logprobs"))


def _lineage(fields: Fields) -> Lineage:
    texts = {name: fields.text(name) for name in _LINEAGE_TEXTS}
    return Lineage(**texts, figures=fields.numbers_by_name("figures") if fields.has("figures") else {})


def _kind_and_name(fields: Fields) -> dict[str, Any]:
    if not fields.has("kind"):
        return {}
    return {"kind": cast(Kind, fields.text("kind", _KIND)), "name": fields.text("name", NAME)}
