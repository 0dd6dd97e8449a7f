"""All that a trainer needs to go on bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from honed.learner.train.algorithm import State


@dataclass(frozen=True)
class TrainerState:
    """Tensors by name and small JSON objects; no other kind of data."""

    step: int
    """Updates made: the version of the weights."""
    model: dict[str, Tensor]
    """What trains: the language model and its heads."""
    optimizer: dict[str, Tensor]
    generator: Tensor
    """State of the minibatch generator, bytes."""
    algorithm: State
    """What the algorithm's parts keep, by name of the part."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """Of the weights; empty where there is none."""

    def cloned(self) -> TrainerState:
        """A copy on the host that training no longer touches, to go back to."""
        return TrainerState(
            step=self.step,
            model={k: v.to("cpu", copy=True) for k, v in self.model.items()},
            optimizer={k: v.to("cpu", copy=True) for k, v in self.optimizer.items()},
            generator=self.generator.clone(),
            algorithm={part: dict(numbers) for part, numbers in self.algorithm.items()},
            average={k: v.to("cpu", copy=True) for k, v in self.average.items()},
        )
