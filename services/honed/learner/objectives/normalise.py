"""Normalisation of scores, so that the KL coefficient keeps its meaning whatever the scorer's scale.

A normaliser is fitted, or takes note of a batch, before it is applied to that batch. Scores are
float64 numbers on the host: there is one a response.

A response without its truncation token has a fixed reward in place of a score
(lm-human-preferences). It is put in after normalisation, as it is: it is no score, so it neither
fits a normaliser nor passes through one (`batch_rewards`).

Rewards of tokens go by the normalisation of the sums that they are parts of (`placed_rewards`), as
trlx's `scale_reward: ref` does: one gain for all of them keeps what a token is worth beside
another, and the mean is taken off at the last token.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from honed.kit.errors import InvalidArgument
from honed.learner.data.episode import Episode

logger = logging.getLogger(__name__)

_SMALLEST_SPREAD = 1e-8


class RewardNormaliser(Protocol):
    """Turns a batch of scores into rewards; its state travels with the checkpoint."""

    def __call__(self, scores: Sequence[float]) -> list[float]:
        """Takes note of the batch, if it learns from batches, and returns the rewards in the same order."""

    @property
    def line(self) -> tuple[float, float]:
        """Gain and bias of the last call: rewards are `gain * score + bias`, before the clip."""

    @property
    def clip(self) -> float | None:
        """The bound of the absolute reward."""

    def state(self) -> dict[str, float]:
        """What `load_state` needs, as JSON numbers."""

    def load_state(self, state: Mapping[str, float]) -> None:
        """Goes on from `state`."""


def batch_rewards(normaliser: RewardNormaliser, episodes: Sequence[Episode]) -> list[float]:
    """The rewards of a batch: normalised scores, and the fixed reward of each response that misses its truncation token."""
    rewards = iter(normaliser([episode.reward for episode in episodes if not episode.missing]))
    return [episode.reward if episode.missing else next(rewards) for episode in episodes]


def placed_rewards(
    normaliser: RewardNormaliser, episodes: Sequence[Episode], rewards: Sequence[float]
) -> list[list[float]] | None:
    """The rewards of a batch at their tokens; None where no scorer rewards tokens, so that each stands at the last one.

    A token's reward is `gain * r`; at the last one there is also `gain * rest + bias`, `rest` being what scorers gave for the
    response as a whole. So without a clip a row's sum is the response's reward. The clip bounds each token's reward and the
    rest's, as trlx's does: bounding the sum would have to take from tokens what others gained.

    Args:
        normaliser: After `batch_rewards` of these episodes.
        episodes: The batch.
        rewards: What that returned.
    """
    if not any(episode.token_rewards for episode in episodes):
        return None
    gain, bias = normaliser.line
    rows = []
    for episode, reward in zip(episodes, rewards, strict=True):
        row = [0.0] * len(episode.response)
        if episode.token_rewards:
            row = _clipped([gain * each for each in episode.token_rewards], normaliser.clip)
            rest = episode.reward - math.fsum(episode.token_rewards)
            row[-1] += _clipped([gain * rest + bias], normaliser.clip)[0]
        else:
            row[-1] = reward
        rows.append(row)
    return rows


def spread_of(scores: Sequence[float]) -> float:
    """Population deviation; 0 of fewer than two scores."""
    if len(scores) < 2:
        return 0.0
    centre = math.fsum(scores) / len(scores)
    return math.sqrt(math.fsum((s - centre) ** 2 for s in scores) / len(scores))


def is_constant(scores: Sequence[float]) -> bool:
    """Whether scores are all the same, so that nothing can be learned from them."""
    return spread_of(scores) <= _SMALLEST_SPREAD


class GainBias:
    """`gain * score + bias`, fixed, and set so that the reference policy's scores have mean 0 and deviation 1.

    lm-human-preferences sets both on 256 samples of the reference policy (`fit`). As constructed it
    changes nothing.
    """

    def __init__(self, gain: float = 1.0, bias: float = 0.0, *, clip: float | None = None) -> None:
        """`clip` bounds the absolute reward; None leaves it unbounded."""
        self._gain, self._bias, self._clip = gain, bias, _checked(clip)

    def fit(self, scores: Sequence[float], *, mean: float = 0.0, std: float = 1.0) -> None:
        """Sets gain and bias so that `scores` would come out with this mean and population deviation.

        Raises:
            InvalidArgument: with fewer than two scores, or scores that are all the same.
        """
        count = len(scores)
        if count < 2:
            raise InvalidArgument("scores", f"needs at least 2 scores to normalise by, got {count}")
        centre = math.fsum(scores) / count
        spread = spread_of(scores)
        if not (math.isfinite(spread) and spread > _SMALLEST_SPREAD):
            raise InvalidArgument("scores", f"deviation is {spread}; a scorer that says the same of everything cannot train")
        self._gain = std / spread
        self._bias = mean - self._gain * centre

    @property
    def line(self) -> tuple[float, float]:
        """See `RewardNormaliser`."""
        return self._gain, self._bias

    @property
    def clip(self) -> float | None:
        """See `RewardNormaliser`."""
        return self._clip

    def __call__(self, scores: Sequence[float]) -> list[float]:
        """Applies gain, bias and the clip."""
        return _clipped([self._gain * s + self._bias for s in scores], self._clip)

    def state(self) -> dict[str, float]:
        """Gain and bias."""
        return {"gain": self._gain, "bias": self._bias}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Sets gain and bias."""
        self._gain, self._bias = float(state["gain"]), float(state["bias"])


class FittedOnFirstBatch:
    """Gain and bias set on the first batch of a run, which the reference policy sampled, then fixed (lm-human-preferences).

    A batch whose scores are all the same gives no deviation to set a gain by: its rewards are 0,
    the next batch is tried, and the first with a spread sets both for good.
    """

    def __init__(self, inner: GainBias) -> None:
        """Fits `inner`."""
        self._inner = inner
        self._fitted = False

    @property
    def line(self) -> tuple[float, float]:
        """See `RewardNormaliser`."""
        return self._inner.line

    @property
    def clip(self) -> float | None:
        """See `RewardNormaliser`."""
        return self._inner.clip

    def __call__(self, scores: Sequence[float]) -> list[float]:
        """Fits at the first call with scores that differ; applies gain and bias."""
        if not self._fitted and scores:
            if is_constant(scores):
                logger.warning(
                    "all scores of the batch are the same: the reward normalisation waits for scores that differ",
                    extra={"score": scores[0], "scores": len(scores)},
                )
                self._inner.load_state({"gain": 1.0, "bias": -math.fsum(scores) / len(scores)})
            else:
                self._inner.fit(scores)
                self._fitted = True
        return self._inner(scores)

    def state(self) -> dict[str, float]:
        """Gain, bias, and whether they are set."""
        return {**self._inner.state(), "fitted": float(self._fitted)}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Goes on from `state`."""
        self._inner.load_state(state)
        self._fitted = bool(state["fitted"])


class Running:
    """Divides by the running deviation of all scores so far, trlx's `scale_reward: running`.

    Mean and variance are merged batch by batch (Chan et al. 1979); the deviation is the unbiased
    one, as trlx's. The mean is kept unless `shift_mean`, as trlx does.
    """

    def __init__(self, *, shift_mean: bool = False, clip: float | None = None) -> None:
        """`clip` bounds the absolute reward after the division; trlx uses 10."""
        self._shift_mean, self._clip = shift_mean, _checked(clip)
        self._count, self._mean, self._squares = 0.0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Unbiased deviation of all scores seen, at least 1e-8; 1 before there are two scores."""
        if self._count < 2:
            return 1.0
        return max(math.sqrt(self._squares / (self._count - 1)), 1e-8)

    @property
    def line(self) -> tuple[float, float]:
        """See `RewardNormaliser`."""
        return 1.0 / self.std, -(self._mean if self._shift_mean else 0.0) / self.std

    @property
    def clip(self) -> float | None:
        """See `RewardNormaliser`."""
        return self._clip

    def __call__(self, scores: Sequence[float]) -> list[float]:
        """Merges the batch into the running moments, then scales it by them."""
        self._merge(scores)
        shift = self._mean if self._shift_mean else 0.0
        return _clipped([(s - shift) / self.std for s in scores], self._clip)

    def state(self) -> dict[str, float]:
        """Count, mean and sum of squared deviations."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Sets the moments."""
        self._count, self._mean, self._squares = (float(state[k]) for k in ("count", "mean", "squares"))

    def _merge(self, scores: Sequence[float]) -> None:
        if not scores:
            return
        count = len(scores)
        mean = math.fsum(scores) / count
        squares = math.fsum((s - mean) ** 2 for s in scores)
        total = self._count + count
        delta = mean - self._mean
        self._squares += squares + delta * delta * self._count * count / total
        self._mean += delta * count / total
        self._count = total


def _clipped(rewards: list[float], clip: float | None) -> list[float]:
    return rewards if clip is None else [max(-clip, min(clip, r)) for r in rewards]


def _checked(clip: float | None) -> float | None:
    if clip is not None and not clip > 0:
        raise InvalidArgument("reward.clip", f"must be positive, got {clip}")
    return clip
