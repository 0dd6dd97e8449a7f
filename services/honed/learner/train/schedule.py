"""Learning rates over a training that has a budget: by the step, from 0, and by the share of the budget that is used, 0 to 1.

The budget may be one of time as well. The rate then falls by whichever is nearer its end, so that a slow machine ends with a
finished schedule too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Rate = Callable[[int, float], float]


def warmup_then_cosine(peak: float, *, warmup_steps: int, final: float) -> Rate:
    """Rises to `peak` over so many steps, and falls along half a cosine to `final`, a share of it."""

    def rate(step: int, done: float) -> float:
        warmup = min(1.0, (step + 1) / max(1, warmup_steps))
        return peak * warmup * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done)))

    return rate


def warmup_then_linear(peak: float, *, warmup: float) -> Rate:
    """Rises to `peak` over a share of the training, and falls linearly to 0. The first step has a small rate, not none."""

    def rate(step: int, done: float) -> float:
        return peak * min(1.0, (done + 0.002) / (warmup + 0.002)) * (1.0 - done)

    return rate
