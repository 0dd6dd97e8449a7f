"""A judgement on its way to the record, and what the contract's rules cannot say of it: that its parts fit together.

Clients check before they send, to name the line of a file; the preference service checks whatever arrives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from honed.kit.errors import InvalidArgument
from honed.v1 import preference_pb2 as pb

_NEEDED = {"pairwise": 2, "ranking": 2, "rating": 1, "thumbs": 1, "edit": 0, "flag": 1}


@dataclass(frozen=True, slots=True)
class Entry:
    """A judgement on its way into the record, under the key that names it for ever."""

    key: str
    judgement: pb.Judgement


def check_judgement(judgement: pb.Judgement, path: str = "judgement") -> None:
    """Checks that a judgement makes sense.

    Args:
        judgement: passed the contract's rules.
        path: where it stands in the request, for the error's field.

    Raises:
        InvalidArgument: names the field and says what would be right.
    """
    kind = judgement.WhichOneof("verdict")
    responses = len(judgement.responses)
    if kind is None:
        raise InvalidArgument(f"{path}.verdict", "is missing; set one of " + ", ".join(_NEEDED))
    if responses < _NEEDED[kind]:
        raise InvalidArgument(
            f"{path}.responses", f"a {kind} judgement needs at least {_NEEDED[kind]}, this one has {responses}"
        )
    for field, index in _indexes(judgement, kind):
        if index >= responses and (responses or kind != "edit" or index):
            raise InvalidArgument(f"{path}.{kind}.{field}", f"no response {index}; there are {responses}, counted from 0")
    if kind == "ranking" and len(judgement.ranking.ranks) != responses:
        raise InvalidArgument(
            f"{path}.ranking.ranks", f"{len(judgement.ranking.ranks)} ranks for {responses} responses; give one for each"
        )
    for position, index in enumerate(judgement.shown_order):
        if index >= responses:
            raise InvalidArgument(
                f"{path}.shown_order[{position}]", f"no response {index}; there are {responses}, counted from 0"
            )
    if judgement.HasField("judged_at"):
        _check_time(judgement, f"{path}.judged_at")
    check_word(judgement.annotator, f"{path}.annotator")
    check_word(judgement.source, f"{path}.source")
    check_labels(judgement.labels, f"{path}.labels")


def check_word(text: str, path: str) -> None:
    """Checks that a text to select by can be stored on every database.

    Raises:
        InvalidArgument: it holds the character NUL, which PostgreSQL's text cannot.
    """
    if "\0" in text:
        raise InvalidArgument(path, "holds the character NUL; leave it out")


def check_labels(labels: Mapping[str, str], path: str) -> None:
    """Checks that labels can be stored on every database.

    Raises:
        InvalidArgument: one holds the character NUL.
    """
    for name, value in labels.items():
        check_word(name + value, f"{path}[{name}]")


def _check_time(judgement: pb.Judgement, path: str) -> None:
    time = judgement.judged_at
    # The range of google.protobuf.Timestamp: years 1 to 9999.
    if not (-62_135_596_800 <= time.seconds <= 253_402_300_799 and 0 <= time.nanos < 1_000_000_000):
        raise InvalidArgument(path, "is no time between the years 1 and 9999")


def _indexes(judgement: pb.Judgement, kind: str) -> list[tuple[str, int]]:
    match kind:
        case "pairwise":
            return [("preferred", judgement.pairwise.preferred), ("other", judgement.pairwise.other)]
        case "ranking":
            return []
        case "rating":
            return [("response", judgement.rating.response)]
        case "thumbs":
            return [("response", judgement.thumbs.response)]
        case "edit":
            return [("response", judgement.edit.response)]
        case _:
            return [("response", judgement.flag.response)]
