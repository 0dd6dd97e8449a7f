"""What the contract's rules cannot say of a judgement: that its parts fit together.

The rules of the .proto have passed before; here each index must name a response, and each kind must have what it judges.
"""

from __future__ import annotations

from collections.abc import Mapping

from honed.kit.errors import InvalidArgument
from honed.v1 import preference_pb2 as pb

_NEEDED = {"pairwise": 2, "ranking": 2, "rating": 1, "thumbs": 1, "edit": 0, "flag": 1}


_MAX_LABELS = 32
MAX_ID = 2**63 - 1
"""The largest id that both databases can hold."""


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
    for place, index in enumerate(judgement.shown_order):
        if index >= responses:
            raise InvalidArgument(f"{path}.shown_order[{place}]", f"no response {index}; there are {responses}, counted from 0")
    if judgement.HasField("judged_at"):
        _check_time(judgement, f"{path}.judged_at")
    check_word(judgement.annotator, f"{path}.annotator")
    check_word(judgement.source, f"{path}.source")
    _check_labels(judgement.labels, f"{path}.labels")


def check_filter(selection: pb.JudgementFilter, path: str = "filter") -> None:
    """Checks that a filter can be asked of every database.

    Raises:
        InvalidArgument: names the field and says what would be right.
    """
    if len(selection.labels) > _MAX_LABELS:
        raise InvalidArgument(f"{path}.labels", f"{len(selection.labels)} labels; a judgement has at most {_MAX_LABELS}")
    _check_labels(selection.labels, f"{path}.labels")
    for place, source in enumerate(selection.sources):
        check_word(source, f"{path}.sources[{place}]")
    if selection.after_id > MAX_ID:
        raise InvalidArgument(f"{path}.after_id", f"{selection.after_id} is above every id; ids end at {MAX_ID}")


def check_word(text: str, path: str) -> None:
    """Checks that a text to select by can be stored on every database.

    Raises:
        InvalidArgument: it holds the character NUL, which PostgreSQL's text cannot.
    """
    if "\0" in text:
        raise InvalidArgument(path, "holds the character NUL; leave it out")


def _check_labels(labels: Mapping[str, str], path: str) -> None:
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
