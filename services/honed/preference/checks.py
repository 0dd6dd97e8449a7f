"""What the contract's rules cannot say of a filter: that every database can be asked for it."""

from __future__ import annotations

from honed.judgements import check_judgement, check_labels, check_word
from honed.kit.errors import InvalidArgument
from honed.v1 import preference_pb2 as pb

__all__ = ["MAX_ID", "check_filter", "check_judgement", "check_word"]

_MAX_LABELS = 32
MAX_ID = 2**63 - 1
"""The largest id that both databases can hold."""


def check_filter(selection: pb.JudgementFilter, path: str = "filter") -> None:
    """Checks that a filter can be asked of every database.

    Raises:
        InvalidArgument: names the field and says what would be right.
    """
    if len(selection.labels) > _MAX_LABELS:
        raise InvalidArgument(f"{path}.labels", f"{len(selection.labels)} labels; a judgement has at most {_MAX_LABELS}")
    check_labels(selection.labels, f"{path}.labels")
    for position, source in enumerate(selection.sources):
        check_word(source, f"{path}.sources[{position}]")
    if selection.after_id > MAX_ID:
        raise InvalidArgument(f"{path}.after_id", f"{selection.after_id} is above every id; ids end at {MAX_ID}")
