"""A critic that shares nothing with the policy: a transformer of its own and a value head.

InstructGPT starts it from the reward model, whose head then is its own: before the first update it values a state as the reward
model scores the text so far.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from honed.kit.errors import FailedPrecondition
from honed.learner.data.batches import MicroBatch
from honed.learner.models.policy import Transformer, value_head
from honed.models.attention import Precision
from honed.models.loader import load_classifier
from honed.models.pooling import Pooling
from honed.models.reward_model import RewardModel


class ValueModel(Transformer):
    """Values of states, by a transformer of its own."""

    def __init__(self, classifier: Any, head: nn.Linear, *, precision: Precision = "float32") -> None:
        """Takes over the body of a classifier; `head` reads its last hidden states, `[..., d]` to `[..., 1]`."""
        super().__init__(classifier.base_model, precision=precision)
        self.head = head.to(self.device)

    @classmethod
    def from_reward_model(cls, directory: Path, *, device: torch.device, precision: Precision = "float32") -> Self:
        """Body and head of a reward model.

        Raises:
            DataLoss: Files or weights are missing or damaged.
            FailedPrecondition: It is no reward model, or its head reads something else than the last state of a text.
        """
        model = RewardModel.load(directory, device=device)
        if model.pooling != Pooling():
            raise FailedPrecondition("its head does not read the last state of the last layer, as a critic's does")
        weight: Tensor = model.classifier.score.weight
        head = value_head(weight.shape[1])
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.fill_(model.bias)
        return cls(model.classifier, head, precision=precision)

    @classmethod
    def from_language_model(cls, directory: Path, *, device: torch.device, precision: Precision = "float32") -> Self:
        """Body of a language model, and a head that is exactly zero.

        Raises:
            DataLoss: Files or weights are missing or damaged.
            FailedPrecondition: transformers has no classifier of this family.
        """
        classifier = load_classifier(directory, device=device, new_head=True)
        return cls(classifier, value_head(classifier.score.weight.shape[1]), precision=precision)

    def values(self, batch: MicroBatch) -> Tensor:
        """The value of the state before each action token, `[N]`, float32."""
        values: Tensor = self.head(self.hidden_states(batch))
        return values.squeeze(-1)
