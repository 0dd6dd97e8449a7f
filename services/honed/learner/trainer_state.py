"""All that a trainer needs to go on bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TrainerState:
    """Tensors by name and small JSON objects; no other kind of data."""

    step: int
    """Updates made: the version of the weights."""
    model: dict[str, Tensor]
    """Policy and value head."""
    optimizer: dict[str, Tensor]
    generator: Tensor
    """State of the minibatch generator, bytes."""
    kl: Mapping[str, float]
    normaliser: Mapping[str, float]

    def cloned(self) -> TrainerState:
        """A copy on the host that training no longer touches, to go back to."""
        return TrainerState(
            step=self.step,
            model={k: v.to("cpu", copy=True) for k, v in self.model.items()},
            optimizer={k: v.to("cpu", copy=True) for k, v in self.optimizer.items()},
            generator=self.generator.clone(),
            kl=dict(self.kl),
            normaliser=dict(self.normaliser),
        )
