"""Divides sequences among forward passes: neighbours in length go together, so that little is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_WORTH_A_PASS: Final = 128  # padding tokens whose cost is about that of starting another pass


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Groups indices of `lengths`, longest first.

    A group ends where its padded size would pass `budget`, or where its padding would cost more than another pass.

    Args:
        lengths: Tokens of each sequence, at least 1.
        budget: Tokens of a group at most, padding included. A sequence that is longer makes a group alone.

    Returns:
        Groups of indices; each index once.
    """
    groups: list[list[int]] = []
    widest, padding = 0, 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        rows = len(groups[-1]) if groups else 0
        wasteful = padding + widest - length > _WORTH_A_PASS + rows * widest // 8
        if not groups or (rows + 1) * widest > budget or wasteful:
            groups.append([])
            widest, padding = length, 0
        groups[-1].append(index)
        padding += widest - length
    return groups
