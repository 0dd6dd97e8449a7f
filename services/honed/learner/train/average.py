"""The exponential moving average of the weights that train (InstructGPT: 0.992 an iteration).

After t updates it is `sum_i d^(t-i) w_i / sum_i d^(t-i)`, i = 1..t, with `w_i` the weights after update i: bias-corrected as in
Adam (Kingma & Ba 2015, section 3), so that the weights before the first update have no part in it, however short the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from honed.kit.errors import DataLoss

_COUNT: Final = "updates"
_WEIGHT: Final = "weight/"


class WeightAverage:
    """Follows the parameters of a module that train; empty until the first `add`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """`decay` is between 0 and 1; the module is what is published: heads that only training needs are left out."""
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._means = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.decay = decay
        self.updates = 0
        """How many updates it is over."""

    @torch.no_grad()
    def add(self) -> None:
        """Takes the weights as they are now for those of one more update."""
        self.updates += 1
        share = (1.0 - self.decay) / (1.0 - self.decay**self.updates)
        torch._foreach_lerp_(list(self._means.values()), list(self._parameters.values()), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average into the module, and the weights back when the block ends, bit for bit. Not while they change."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def figures(self) -> dict[str, float]:
        """What a version that is an average says of itself."""
        return {"average_decay": self.decay, "average_updates": float(self.updates)}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds; nothing before the first update. Shares memory with the average."""
        if not self.updates:
            return {}
        return {_COUNT: torch.tensor(self.updates), **{f"{_WEIGHT}{name}": mean for name, mean in self._means.items()}}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `tensors` gave; from nothing, it starts afresh.

        Raises:
            DataLoss: They are of other weights than those that train; nothing is changed then.
        """
        if not tensors:
            self.restart()
            return
        found = {name.removeprefix(_WEIGHT): value for name, value in tensors.items() if name != _COUNT}
        if {name: value.shape for name, value in found.items()} != {name: p.shape for name, p in self._parameters.items()}:
            raise DataLoss("the stored average is of other weights than those that train: was the model changed?")
        for name, mean in self._means.items():
            mean.copy_(found[name])
        self.updates = int(tensors[_COUNT])

    def restart(self) -> None:
        """Forgets all updates."""
        self.updates = 0

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            kept = parameter.clone()
            parameter.copy_(self._means[name])
            self._means[name].copy_(kept)
