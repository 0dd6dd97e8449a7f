"""What a trainer moves: parameters by name, to checkpoint and to load."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from honed.kit.errors import DataLoss


class Trained(nn.Module, ABC):
    """A module that a trainer moves. What is published of it may be less: heads that only training needs stay here."""

    @property
    @abstractmethod
    def published(self) -> nn.Module:
        """What others get of it: weights by the names of transformers."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that trains, by name; tied weights once."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """Parameters by name, tied weights once, sharing memory with the model: what a checkpoint holds."""
        return {name: p.detach() for name, p in self.named_parameters()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copies what `tensors` gave into the parameters.

        Raises:
            DataLoss: when names or shapes are not this model's; no parameter is changed then.
        """
        own = dict(self.named_parameters())
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise DataLoss(f"stored weights are another model's: {len(odd)} names differ, the first is {odd[0]!r}")
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise DataLoss(f"stored weight {name!r} has shape {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}")
        for name, parameter in own.items():
            parameter.detach().copy_(tensors[name])
