"""Where a reward model's head reads a text: the states of which layers, at the last token or as their mean over all tokens.

It stands in the model's configuration as `reward_read` and `reward_layers`. A model without either is one of transformers' own
kind, read at the last token of the last layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

import torch
from torch import Tensor

from honed.kit.errors import DataLoss, FailedPrecondition

Place = Literal["last", "mean"]
_KNOWN: Final = frozenset({"reward_read", "reward_layers", "reward_bias"})


@dataclass(frozen=True)
class Pooling:
    """What the head reads.

    Attributes:
        read: At the last token, or the mean over all tokens.
        layers: Numbers of layers, from 1, whose states are concatenated in this order; empty for the last one alone. The last
            one is read behind the final norm, the others as they come out of their layer.
    """

    read: Place = "last"
    layers: tuple[int, ...] = ()

    @classmethod
    def of_config(cls, config: Mapping[str, Any], directory: Path) -> Self:
        """What a model's configuration says.

        Raises:
            DataLoss: It says something that cannot be.
            FailedPrecondition: It says something that this release does not know.
        """
        where = f"{directory}/config.json"
        if unknown := sorted(key for key in config if key.startswith("reward_") and key not in _KNOWN):
            raise FailedPrecondition(f"{where} has {unknown[0]}, which this release of honed does not know: take a newer one")
        read, layers = config.get("reward_read", "last"), config.get("reward_layers", [])
        if read not in get_args(Place):
            raise FailedPrecondition(
                f"{where}: reward_read is {read!r}; this release of honed knows {', '.join(get_args(Place))}"
            )
        whole = isinstance(layers, list) and all(type(number) is int and number > 0 for number in layers)
        if not whole or len(set(layers)) < len(layers):
            raise DataLoss(f"{where}: reward_layers is {layers!r}, it must list different layers, counted from 1")
        depth = config.get("num_hidden_layers", config.get("n_layer"))
        if isinstance(depth, int) and max(layers, default=0) > depth:
            raise DataLoss(f"{where}: reward_layers has {max(layers)}, and the model {depth} layers")
        return cls(read, tuple(layers))

    def write(self, config: Any) -> None:
        """Puts it into a configuration of transformers, in the place of what that said: nothing, where heads read as usual."""
        for name, value, usual in (("reward_read", self.read, "last"), ("reward_layers", list(self.layers), [])):
            if value != usual:
                setattr(config, name, value)
            elif hasattr(config, name):
                delattr(config, name)

    def width(self, hidden_size: int) -> int:
        """How many numbers the head reads."""
        return hidden_size * max(1, len(self.layers))

    def pooled(self, body: Any, inputs: Mapping[str, Tensor], lengths: Tensor) -> Tensor:
        """What the head reads of texts in one pass of a body of transformers, `[n, width]` float32.

        Args:
            body: A model without a head.
            inputs: Token ids or embeddings `[n, L]`, padded on the right.
            lengths: Of each text, `[n]`, on the device.
        """
        output = body(**inputs, use_cache=False, output_hidden_states=bool(self.layers))
        chosen = [output.hidden_states[number] for number in self.layers] or [output.last_hidden_state]
        if self.read == "last":
            rows = torch.arange(len(lengths), device=lengths.device)
            return torch.cat([states[rows, lengths - 1].float() for states in chosen], dim=-1)
        mask = (torch.arange(chosen[0].shape[1], device=lengths.device) < lengths[:, None]).unsqueeze(-1)
        # Selected, not multiplied by 0: what a padding position holds is of no interest, even where it is no number.
        sums = [torch.where(mask, states.float(), 0.0).sum(1) for states in chosen]
        return torch.cat([each / lengths[:, None] for each in sums], dim=-1)
