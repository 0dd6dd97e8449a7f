"""Losses of algorithms that learn from preferences directly: pure functions of log-probability ratios."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional


def direct_preference(
    margins: Tensor, *, beta: float, kind: Literal["sigmoid", "ipo", "hinge"] = "sigmoid", label_smoothing: float = 0.0
) -> Tensor:
    """Loss of each pair, `[n]`."""
    match kind:
        case "sigmoid":
            right, wrong = functional.logsigmoid(beta * margins), functional.logsigmoid(-beta * margins)
            return -(1 - label_smoothing) * right - label_smoothing * wrong
        case "ipo":
            return (margins - 1 / (2 * beta)) ** 2
        case "hinge":
            return functional.relu(1 - beta * margins)
