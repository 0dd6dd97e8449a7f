"""What a peer's process tells: one JSON line an update on stdout. It imports what the peers' environment has."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Done(Exception):
    """The time of the training is over."""


class Teller(TrainerCallback):
    """Tells of each update when it was logged; ends the training some seconds after the first."""

    def __init__(self, seconds: float, score: Callable[[dict[str, Any]], float | None]) -> None:
        """`score` finds the mean score of a batch in what the trainer logs; None where that is no batch's."""
        self._seconds, self._score, self._began = seconds, score, 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        """See `TrainerCallback`."""
        now, score = time.time(), self._score(logs or {})
        if score is None:
            return
        print(json.dumps({"at": now, "score": float(score), "cpu": time.process_time()}), flush=True)
        self._began = self._began or now
        if now - self._began > self._seconds:
            raise Done
