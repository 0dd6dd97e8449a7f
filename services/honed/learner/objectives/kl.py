"""Controllers of the KL coefficient, one rule a class, behind one port with serialisable state.

The KL that they see is the mean over a batch's responses of the sum over tokens of `logp - ref_logp`, in nats a response.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from honed.kit.errors import InvalidArgument


class KLController(Protocol):
    """Holds the KL coefficient and moves it once a batch."""

    @property
    def value(self) -> float:
        """The coefficient, reward per nat."""

    def update(self, kl: float, episodes: int) -> None:
        """Takes note of a batch: its KL in nats a response, and how many responses it had."""

    def state(self) -> dict[str, float]:
        """What `load_state` needs, as JSON numbers."""

    def load_state(self, state: Mapping[str, float]) -> None:
        """Goes on from `state`. The settings of the controller are not part of it."""


class _Coefficient:
    """The part that all controllers share: a number and its state."""

    def __init__(self, coefficient: float) -> None:
        if not coefficient >= 0.0:
            raise InvalidArgument("kl.coefficient", f"must not be negative, got {coefficient}")
        self._value = coefficient

    @property
    def value(self) -> float:
        """The coefficient, reward per nat."""
        return self._value

    def state(self) -> dict[str, float]:
        """The coefficient."""
        return {"value": self._value}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Sets the coefficient."""
        self._value = float(state["value"])


class FixedKL(_Coefficient):
    """A coefficient that never moves."""

    def update(self, kl: float, episodes: int) -> None:
        """Does nothing."""


class AdaptiveKL(_Coefficient):
    """OpenAI's controller: proportional, in log space, over a horizon of responses.

    `e = clip(KL / target - 1, -0.2, 0.2)`, `beta <- beta (1 + e n / horizon)` with n the responses of the batch
    (lm-human-preferences, Ziegler et al. 2019, section 2.2).
    """

    def __init__(self, coefficient: float, *, target: float, horizon: int) -> None:
        """Starts at `coefficient`; `target` in nats a response, `horizon` in responses."""
        super().__init__(coefficient)
        _require_positive("kl.target", target)
        _require_positive("kl.horizon", horizon)
        self._target, self._horizon = target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """Moves the coefficient towards the target by at most 0.2 n / horizon of itself."""
        error = _clip(kl / self._target - 1.0)
        self._value *= 1.0 + error * episodes / self._horizon


class RL4LMsKL(_Coefficient):
    """RL4LMs' controller: like OpenAI's with a constant gain for each batch, whatever its size.

    `coeff <- coeff (1 + 0.1 clip((KL - target) / target, -0.2, 0.2))`.
    """

    GAIN = 0.1

    def __init__(self, coefficient: float, *, target: float) -> None:
        """Starts at `coefficient`; `target` in nats."""
        super().__init__(coefficient)
        _require_positive("kl.target", target)
        self._target = target

    def update(self, kl: float, episodes: int) -> None:
        """Moves the coefficient by at most 2% of itself."""
        self._value *= 1.0 + self.GAIN * _clip((kl - self._target) / self._target)


def _clip(error: float) -> float:
    return max(-0.2, min(0.2, error))


def _require_positive(field: str, value: float) -> None:
    if not value > 0:
        raise InvalidArgument(field, f"must be positive, got {value}")
