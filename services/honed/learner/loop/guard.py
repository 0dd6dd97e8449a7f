"""What to do when an update cannot be applied, or a version is refused: skip, go back, and in the end stop training."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["skip", "rollback", "fail"]


class Guard:
    """Counts failures in a row. So many end in a roll-back; if as many follow without a success, training has failed."""

    def __init__(self, limit: int) -> None:
        """`limit` failures in a row are one too many."""
        self._limit = limit
        self._in_a_row = 0
        self._rolled_back = False

    def failed(self) -> Verdict:
        """Counts a failure and says what follows."""
        self._in_a_row += 1
        if self._in_a_row < self._limit:
            return "skip"
        self._in_a_row = 0
        if self._rolled_back:
            return "fail"
        self._rolled_back = True
        return "rollback"

    def succeeded(self) -> None:
        """Forgets the failures."""
        self._in_a_row, self._rolled_back = 0, False
