"""What the trainer asks of an algorithm.

For each update it calls `prepare` once, `minibatch` and its `losses` again and again, and `finish` once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from honed.artifacts.version import VersionId

B = TypeVar("B", bound=Sequence[Any])
B_contra = TypeVar("B_contra", bound=Sequence[Any], contravariant=True)

State = Mapping[str, Mapping[str, float]]
"""What the parts of an algorithm keep from update to update: JSON numbers by name of the part."""


class BadLoss(Exception):
    """What was computed cannot be trained on; says why. The trainer refuses the batch."""


@dataclass(frozen=True)
class UpdateContext:
    """What the trainer tells an algorithm of the update that begins.

    Attributes:
        step: Updates before it.
        version: Of the weights before it; None when that is not known.
        microbatch_tokens: Most tokens that a model may read at once.
        stop_if_asked: To be called before each pass of a model; raises when the update is to stop.
        whole: The first optimizer step trains on the whole batch, so that a pass that was made before it can be one of its.
    """

    step: int
    version: VersionId | None
    microbatch_tokens: int
    stop_if_asked: Callable[[], None]
    whole: bool = False


class Minibatch(Protocol):
    """The part of a batch that one optimizer step trains on."""

    @property
    def micro_batches(self) -> Sequence[Any]:
        """What the model reads at once, one after the other."""

    @property
    def denominators(self) -> Mapping[str, int]:
        """What each sum of losses is divided by, of the whole minibatch: "tokens", "responses", "pairs" ..."""

    def losses(self, micro: Any) -> Mapping[str, Tensor]:
        """Sums of losses of one micro-batch, with gradient, by the name of their denominator."""

    def check(self) -> None:
        """Looks at what `losses` computed before the step is made.

        Raises:
            BadLoss: The step must not be made.
        """


class Prepared(Protocol):
    """A batch that the models have read once."""

    def __len__(self) -> int:
        """How many examples it has to train on: what minibatches are made of. Without any, no step is made."""

    def minibatch(self, chosen: Sequence[int]) -> Minibatch:
        """The examples of these indices."""

    def finish(self) -> Mapping[str, float]:
        """Ends the update once all steps are made: what moves once a batch moves; returns figures by name.

        Raises:
            BadLoss: The next update could not start from here.
        """


class Algorithm(Protocol[B_contra]):
    """How to learn from a kind of batch. It holds the models that it reads, and all that it keeps is in `state()`."""

    def prepare(self, batch: B_contra, context: UpdateContext) -> Prepared:
        """Reads a batch with the models, without gradient.

        Raises:
            BadLoss: The batch cannot be trained on.
        """

    def state(self) -> State:
        """What `load_state` needs."""

    def load_state(self, state: State) -> None:
        """Goes on from `state`."""
