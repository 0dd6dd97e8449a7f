"""What keeps the scorers from scoring: an alarm while it lasts, and whether waiting can end it.

An outage ends by itself, and so may most errors of a scorer: they are waited for under the alarm. But where a process has never
had a score, and for a minute each answer of a scorer was no score at all (NaN, or the wrong shape), its code is wrong, and
every further try gives the same. A run that is to end when it fails ends then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from honed.reward.scorer import NotAScore, ScorerFailed, is_outage

_BROKEN_AFTER_S: Final = 60.0
_BROKEN_AFTER_TRIES: Final = 3


def reason_of(error: Exception) -> str:
    """An error of scoring for people, without the index that a sample had in its batch."""
    return str(error.at(None)) if isinstance(error, ScorerFailed) else f"{type(error).__name__}: {error}"


class Trouble:
    """What one scoring worker knows of its scorers' failures. Empty texts while they work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self.alarm = ""
        """Why no rollout is scored at present, and what to do about it."""
        self.broken = ""
        """Why none ever will be by the code that runs: known after a minute without anything but answers of the wrong form."""
        self._clock = clock
        self._has_scored = False
        self._wrong_since: float | None = None
        self._tries = 0

    def scored(self) -> None:
        """The scorers work."""
        self._has_scored = True
        self.alarm = ""
        self._forget()

    def failed(self, errors: Sequence[Exception]) -> None:
        """Nothing can be scored; `errors` are those of one try, of rollouts and of the proof that the scorer does not work."""
        first = errors[0]
        if is_outage(first):
            advice = "if it does not come back by itself, see to what it calls"
        else:
            advice = "mend the scorer, and start the reward service again"
        reason = reason_of(first)
        self.alarm = f"{reason}; rollouts go back to the queue and none trains until it works: {advice}"
        if self._has_scored or not all(isinstance(error, NotAScore) for error in errors):
            self._forget()
            return
        if self._wrong_since is None:
            self._wrong_since = self._clock()
        self._tries += 1
        if self._tries >= _BROKEN_AFTER_TRIES and self._clock() - self._wrong_since >= _BROKEN_AFTER_S:
            self.broken = f"{reason}; it has given no score since the reward service started: mend the scorer"

    def facts(self) -> dict[str, str]:
        """What the process says of it where it registers: `alarm` and `broken`, each only while there is one."""
        return {name: text for name, text in (("alarm", self.alarm), ("broken", self.broken)) if text}

    def _forget(self) -> None:
        self.broken, self._wrong_since, self._tries = "", None, 0
