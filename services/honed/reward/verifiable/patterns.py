"""Regular expressions that end: a search is given up after a time, so that no response makes a pattern hang the service.

`regex` checks the time while it searches and lets other threads run meanwhile; `re` does neither.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Final

import regex
from pydantic import AfterValidator

_BATCH_S: Final = 20.0
"""What one batch may cost at most, far below the service's bound of a batch."""


def compiled(pattern: str) -> Any:
    """A compiled pattern.

    Raises:
        ValueError: It is no regular expression; says where.
    """
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def _checked(pattern: str) -> str:
    compiled(pattern)
    return pattern


Pattern = Annotated[str, AfterValidator(_checked)]
"""An option that is a regular expression. `compiled` costs little for one that was compiled before: `regex` keeps them."""


def time_limit(wanted_s: float, batch: Sequence[object]) -> float:
    """Seconds for each item of a batch: what is wanted, or less where the batch is so large that it would take too long."""
    return min(wanted_s, _BATCH_S / max(1, len(batch)))


def found(pattern: Any, text: str, limit_s: float, *, whole: bool = False) -> bool:
    """Whether the pattern matches anywhere, or `whole` the text; False too when the time is over."""
    try:
        return (pattern.fullmatch if whole else pattern.search)(text, timeout=limit_s) is not None
    except TimeoutError:
        return False


def last_answer(pattern: Any, text: str, limit_s: float) -> str | None:
    """The first group of the last match, or all of it where the pattern has no group; None without one, or without time."""
    try:
        last = deque(pattern.finditer(text, timeout=limit_s), maxlen=1)
    except TimeoutError:
        return None
    return last[0][1 if pattern.groups else 0] if last else None  # None too where the group took no part
