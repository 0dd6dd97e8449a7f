"""Trains a reward model's head alone, on a frozen body.

The losses of judgements are convex in the weights of a linear head. So the head is not approached by small steps but solved
for, over all judgements at once, with an L2 penalty (ridge) on features of mean 0 and deviation 1: for comparisons this is
logistic regression on the difference of features. The scale of the features goes into the head's weights, so that what is
saved is a reward model like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from honed.kit.errors import InvalidArgument
from honed.learner.data.judgement import Judgement, SharedTexts, Tokens
from honed.learner.settings import RewardTrainingSettings
from honed.learner.supervised.features import features_of
from honed.learner.supervised.loss import SummedLoss
from honed.models.reward_model import RewardModel

_ITERATIONS: Final = 1000
_READING: Final = 0.95  # of the work
_TOLERANCE: Final = 1e-6
_SMALLEST_DEVIATION: Final = 1e-6


@dataclass(frozen=True)
class Solved:
    """A head that was solved for.

    Attributes:
        weights: Of the features as they are, `[width]`.
        loss: Mean over judgements, without the penalty.
        iterations: Of L-BFGS.
    """

    weights: Tensor
    loss: float
    iterations: int


def train_head(
    model: RewardModel,
    judgements: Sequence[Judgement],
    section: RewardTrainingSettings,
    directory: Path,
    *,
    prefix: Tokens = (),
    report: Callable[[float, str], None] = lambda done, doing: None,
) -> Solved:
    """Solves for the head of `model`; its body stays as it is.

    Args:
        model: Of `RewardModel.from_language_model`.
        judgements: At least one.
        section: The objective, the ridge, and how many tokens are read at once.
        directory: Keeps what was read of the texts if this is interrupted.
        prefix: What the tokenizer puts in front of a text.
        report: Called with the share that is done and what is being done; raising from it ends the training.

    Raises:
        InvalidArgument: There are no judgements, or the body says the same of all texts, or something not finite of some.
    """
    if not judgements:
        raise InvalidArgument("judgements", "there are none to learn from")
    shared = SharedTexts.of(judgements)
    texts = [model.fitted(text, prefix)[0] for text in shared.texts]
    features = features_of(
        model,
        texts,
        directory,
        pass_tokens=section.microbatch_tokens,
        report=lambda done: report(_READING * done, f"{round(done * len(texts))} of {len(texts)} texts read"),
    )
    # Else the mean of every feature is NaN, and all texts look alike.
    if broken := int((~features.isfinite()).any(1).sum()):
        raise InvalidArgument(
            "reward_training.start_from",
            f"of {broken} of {len(texts)} texts the body says something that is not finite: set reward_training.precision to "
            "float32, or start from another model, with weights that are finite",
        )
    report(_READING, "solving for the head")
    loss = SummedLoss(shared, section.objective, features.device)
    solved = solve(features, lambda scores: loss(scores) / len(judgements), ridge=section.ridge)
    with torch.no_grad():
        model.classifier.score.weight.copy_(solved.weights.unsqueeze(0))
    return solved


def solve(features: Tensor, loss: Callable[[Tensor], Tensor], *, ridge: float) -> Solved:
    """The weights w that minimise `loss(z w + b) + ridge / 2 |w|^2` with z the features of mean 0 and deviation 1.

    Args:
        features: `[n, width]`; replaced by z, so that they are there once.
        loss: Of scores `[n]`, convex.
        ridge: At least 0.

    Raises:
        InvalidArgument: No feature differs from text to text.
    """
    mean, deviation = features.mean(0), features.std(0, correction=0)
    varies = deviation > _SMALLEST_DEVIATION * (1.0 + mean.abs())
    if not bool(varies.any()):
        raise InvalidArgument("judgements", "the body says the same of all texts: there is nothing for a head to read")
    scale = torch.where(varies, 1.0 / deviation, 0.0)
    features.sub_(mean).mul_(scale)
    weights = torch.zeros(features.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)  # ratings have a level; comparisons leave it at 0
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=_ITERATIONS, tolerance_grad=_TOLERANCE, history_size=20, line_search_fn="strong_wolfe"
    )
    alone = 0.0

    def penalised() -> Tensor:
        nonlocal alone
        optimizer.zero_grad()
        value = loss(features @ weights + bias)
        alone = float(value.detach())
        total = value + 0.5 * ridge * weights.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(penalised)  # type: ignore[no-untyped-call]
    penalised()
    return Solved(weights.detach() * scale, alone, int(optimizer.state[weights]["n_iter"]))
