"""What of a judgement is content, its canonical bytes, and the hash of many.

Canonical bytes are protobuf's deterministic form: fields by number, shortest varints, packed lists, map entries by key. Golden
hashes in the tests pin it, so that a library that wrote it differently would be noticed before it met a database.

Two digests:
    stored content: everything but id and annotator. The same idempotency key with other stored content is a conflict.
    snapshot content: further without `judged_at`. What was judged and said, not who said it when. So erasing an annotator
        leaves every snapshot's hash as it was, and a judgement that came without a time hashes the same wherever it is stored.
        A reader of an export can compute it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from honed.judgements import Entry as Entry
from honed.v1 import preference_pb2 as pb

ERASED = "erased"
"""The annotator of judgements whose annotator was erased: the same for all, so that they cannot be told apart by person."""

KINDS: dict[str, int] = {
    name.removeprefix("JUDGEMENT_KIND_").lower(): number
    for name, number in pb.JudgementKind.items()
    if number != pb.JUDGEMENT_KIND_UNSPECIFIED
}
"""Number of each kind by the name of its field in `Judgement.verdict`."""

KIND_NAMES: dict[int, str] = {number: name for name, number in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Row:
    """An entry as its columns, before it has an id. Times are microseconds since 1970, UTC."""

    key: str
    kind: int
    source: str
    annotator: str
    judged_at: int | None
    content_sha256: bytes
    content: bytes
    labels: dict[str, str]


def to_row(entry: Entry) -> Row:
    """Takes a valid judgement apart."""
    stored = pb.Judgement()
    stored.CopyFrom(entry.judgement)
    verdict = stored.WhichOneof("verdict")
    assert verdict is not None, "checked before"
    annotator = stored.annotator
    judged_at = _microseconds(stored.judged_at) if stored.HasField("judged_at") else None
    stored.ClearField("id")
    stored.ClearField("annotator")
    content = canonical(stored)
    stored.ClearField("judged_at")
    return Row(
        key=entry.key,
        kind=KINDS[verdict],
        source=stored.source,
        annotator=annotator,
        judged_at=judged_at,
        content_sha256=hashlib.sha256(canonical(stored) if judged_at is not None else content).digest(),
        content=content,
        labels=dict(stored.labels),
    )


def to_judgement(id_: int, annotator: str, stored_at: int, content: bytes) -> pb.Judgement:
    """Puts a stored judgement together. One that came without a time gets that of its storing, in microseconds."""
    judgement = pb.Judgement.FromString(content)
    judgement.id = id_
    judgement.annotator = annotator
    if not judgement.HasField("judged_at"):
        judgement.judged_at.CopyFrom(
            Timestamp(seconds=stored_at // 1_000_000, nanos=stored_at % 1_000_000 * 1_000),
        )
    return judgement


def canonical(message: pb.Judgement | pb.JudgementFilter) -> bytes:
    """The message's one byte form."""
    return message.SerializeToString(deterministic=True)


def content_sha256(judgement: pb.Judgement) -> bytes:
    """The digest of one judgement that snapshots hash."""
    content = pb.Judgement()
    content.CopyFrom(judgement)
    for field in ("id", "annotator", "judged_at"):
        content.ClearField(field)
    return hashlib.sha256(canonical(content)).digest()


class SnapshotHash:
    """sha256 over the digests of judgements in order."""

    def __init__(self) -> None:
        """Starts with none."""
        self._hash = hashlib.sha256()
        self.judgements = 0

    def update(self, digests: Iterable[bytes]) -> None:
        """Adds the next judgements' digests (`content_sha256`)."""
        for digest in digests:
            self._hash.update(digest)
            self.judgements += 1

    def hexdigest(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


def _microseconds(time: Timestamp) -> int:
    return time.seconds * 1_000_000 + time.nanos // 1_000
