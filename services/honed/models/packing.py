"""Divides sequences among forward passes: neighbours in length together, to pad little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from honed.kit.errors import InvalidArgument

_WORTH_A_PASS: Final = 128  # padding tokens whose cost is about that of starting another pass


def pack(lengths: Sequence[int], budget: int, *, spare_padding: bool = True) -> list[list[int]]:
    """Groups indices of `lengths`, shortest first, ties by index.

    Args:
        lengths: Tokens of each sequence, at least 1.
        budget: Tokens of a group at most, padding included. A sequence that is longer makes a group
            alone.
        spare_padding: Also end a group where one more sequence would cost more in padding than
            another pass; False makes as few groups as budget and order allow.

    Returns:
        Groups of indices; each index once.

    Raises:
        InvalidArgument: The budget is not positive.
    """
    if budget < 1:
        raise InvalidArgument("max_tokens", f"must be at least 1, got {budget}")
    groups: list[list[int]] = []
    real = 0  # tokens of the last group that are not padding
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        length = lengths[index]
        padded = (len(groups[-1]) + 1) * length if groups else 0
        wasteful = spare_padding and padded - real - length > _WORTH_A_PASS + padded // 8
        if not groups or padded > budget or wasteful:
            groups.append([])
            real = 0
        groups[-1].append(index)
        real += length
    return groups
