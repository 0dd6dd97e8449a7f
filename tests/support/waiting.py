"""Waiting in tests for what has no event, where no event loop runs; `tests.support.run.until` is its sibling in a loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_until(claim: Callable[[], Any], timeout_s: float = 60.0) -> None:
    """Asks again and again until a claim holds.

    Raises:
        AssertionError: it does not within the time.
    """
    end = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < end, f"not within {timeout_s:g} s"
        time.sleep(0.02)
