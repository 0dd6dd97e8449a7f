"""Calls to a store that have no deadline of their own, given one, and a circuit breaker in front of them.

Each call runs in a thread of its own: a call that hangs costs its thread and nobody else's. After
`_TIMEOUTS` calls in a row without an answer the store is not asked for a pause, which doubles with each
further one, so that threads that hang become few however long the store is away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Final, TypeVar

from honed.kit.errors import Unavailable

T = TypeVar("T")

_TIMEOUTS: Final = 3
_PAUSES_S: Final = (1.0, 60.0)
_MOST_HANGING: Final = 64


class StoreCalls:
    """Runs blocking operations of one store, each with the same deadline. For any number of threads."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`timeout_s` is the deadline of each call; `clock` gives seconds."""
        self._timeout_s = timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._hanging = 0
        self._timeouts = 0
        self._pause_s = _PAUSES_S[0]
        self._closed_until = -1.0

    @property
    def hanging(self) -> int:
        """Calls without an answer whose deadline is over."""
        return self._hanging

    def __call__(self, path: str, operation: Callable[[], T]) -> T:
        """Runs `operation` and returns what it returns, or raises what it raises.

        Args:
            path: What it concerns, for the error.
            operation: Blocks.

        Raises:
            Unavailable: It did not answer in time, or the store has not answered lately.
        """
        self._admit(path)
        done: Future[T] = Future()
        threading.Thread(target=_run, args=(done, operation), name="store", daemon=True).start()
        if not wait([done], self._timeout_s).not_done:
            with self._lock:
                self._timeouts, self._pause_s, self._closed_until = 0, _PAUSES_S[0], -1.0
            return done.result()
        with self._lock:
            self._note_timeout()
        done.add_done_callback(lambda _: self._returned())
        raise Unavailable(f"the store did not answer within {self._timeout_s:g} s for {path}")

    def _admit(self, path: str) -> None:
        with self._lock:
            now = self._clock()
            if self._hanging >= _MOST_HANGING:
                raise Unavailable(
                    f"{self._hanging} calls to the store hang, {path} is not asked for: the store is away, or this process "
                    "must be started again"
                )
            if now < self._closed_until:
                left_s = self._closed_until - now
                raise Unavailable(f"the store has not answered lately; it is asked again for {path} in {left_s:.1f} s")
            if self._timeouts >= _TIMEOUTS:  # one call tries whether the store is back; the others wait for its outcome
                self._closed_until = now + self._timeout_s

    def _note_timeout(self) -> None:
        self._hanging += 1
        self._timeouts += 1
        if self._timeouts >= _TIMEOUTS:
            self._closed_until = self._clock() + self._pause_s
            self._pause_s = min(_PAUSES_S[1], self._pause_s * 2)

    def _returned(self) -> None:
        with self._lock:
            self._hanging -= 1


def _run(done: Future[T], operation: Callable[[], T]) -> None:
    try:
        result = operation()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(result)
