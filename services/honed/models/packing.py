"""Divides sequences among forward passes: neighbours in length together, packed without padding, or to pad little."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from honed.kit.errors import InvalidArgument

_WORTH_A_PASS: Final = 128  # padding tokens whose cost is about that of starting another pass


@dataclass(frozen=True)
class Branches:
    """Sequences that begin alike: their beginning stands once, then what each of them has of its own.

    Attributes:
        prefix: Tokens of the beginning.
        lengths: Of what each sequence has of its own, at least 1.
    """

    prefix: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """In all."""
        return self.prefix + sum(self.lengths)


Runs = tuple[tuple[int, int | Branches], ...]
"""How many sequences of which length, or groups of which shape, follow one another."""


def runs_of(shapes: Iterable[int | Branches]) -> Runs:
    """The runs of sequences and groups that stand in this order."""
    return tuple((len(list(same)), shape) for shape, same in groupby(shapes))


def tokens_of(runs: Runs) -> list[int]:
    """Of each run."""
    return [count * (shape.tokens if isinstance(shape, Branches) else shape) for count, shape in runs]


def fill(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Groups indices of `lengths`, shortest first, ties by index, for rows without padding: as few as budget and order allow.

    Args:
        lengths: Tokens of each sequence, at least 1.
        budget: Tokens of a group at most. A sequence that is longer makes a group alone.

    Returns:
        Groups of indices; each index once.

    Raises:
        InvalidArgument: The budget is not positive.
    """
    _check(budget)
    groups: list[list[int]] = []
    left = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or lengths[index] > left:
            groups.append([])
            left = budget
        groups[-1].append(index)
        left -= lengths[index]
    return groups


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Groups indices of `lengths`, shortest first, ties by index, for rows that are padded to the longest of their group.

    A group also ends where one more sequence would cost more in padding than another pass.

    Args:
        lengths: Tokens of each sequence, at least 1.
        budget: Tokens of a group at most, padding included. A sequence that is longer makes a group
            alone.

    Returns:
        Groups of indices; each index once.

    Raises:
        InvalidArgument: The budget is not positive.
    """
    _check(budget)
    groups: list[list[int]] = []
    real = 0  # tokens of the last group that are not padding
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        length = lengths[index]
        padded = (len(groups[-1]) + 1) * length if groups else 0
        wasteful = padded - real - length > _WORTH_A_PASS + padded // 8
        if not groups or padded > budget or wasteful:
            groups.append([])
            real = 0
        groups[-1].append(index)
        real += length
    return groups


def _check(budget: int) -> None:
    if budget < 1:
        raise InvalidArgument("max_tokens", f"must be at least 1, got {budget}")
