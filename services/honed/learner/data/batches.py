"""Continuations as tensors: micro-batches by token budget for the model, padded rows for the arithmetic on rewards.

Two layouts meet here. The model reads *micro-batches*: sequences one behind the other in one row,
shortest first, without padding, with the places of the states that predict action tokens beside
them. Rewards and advantages live in *rows*, `[B, T]`, T the longest response, padded on the right.
`MicroBatch.slots` leads from one to the other. Masks and positions come from lengths, never from
token ids: a token that equals the padding id is an action like any other.

The position of each token in its sequence equals the exclusive cumulative sum of the attention
mask, which lm-human-preferences uses for its pads on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from honed.learner.data.continuation import Continuation
from honed.learner.data.episode import Episode
from honed.models.packing import Branches, Runs, fill, runs_of

# Attention in branches costs about as much as reading so many tokens, and as so much of what there is to read.
_LEAST_SAVED: Final = 32
_LEAST_SHARE: Final = 1 / 8


@dataclass(frozen=True)
class MicroBatch:
    """What the model reads at once: sequences with T tokens in all, N action tokens among them.

    The last response token is left out of `tokens`: it is predicted, and predicts nothing.
    """

    tokens: Tensor
    """Prompts and responses without their last tokens, one behind the other, `[T]`; a shared prompt stands once."""
    positions: Tensor
    """The place of each token in its sequence, `[T]`."""
    runs: Runs
    """How many sequences of which length, or groups of which shape, follow one another."""
    states: Tensor
    """Where in `tokens` the state stands that predicts each action token, `[N]`."""
    targets: Tensor
    """The action tokens, `[N]`, sequence by sequence."""
    temperatures: Tensor
    """The temperature that each action token was sampled at, `[N]`, float32."""
    slots: Tensor
    """Where each action token stands in flattened rows `[B, T]`, `[N]`."""

    def to(self, device: torch.device) -> MicroBatch:
        """Copies to a device."""
        return MicroBatch(
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            runs=self.runs,
            states=self.states.to(device),
            targets=self.targets.to(device),
            temperatures=self.temperatures.to(device),
            slots=self.slots.to(device),
        )


@dataclass(frozen=True)
class Rows:
    """What is known of B episodes before the model has read them, responses padded on the right to T."""

    mask: Tensor
    """True on action tokens, `[B, T]`."""
    behaviour: Tensor
    """The sampler's log-probabilities, `[B, T]`, zero on pads, nats."""

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Rows:
        """Lays out the episodes in their order."""
        width = max(len(e.response) for e in episodes)
        lengths = torch.tensor([len(e.response) for e in episodes])
        mask = torch.arange(width).unsqueeze(0) < lengths.unsqueeze(1)
        behaviour = torch.zeros(mask.shape)
        behaviour[mask] = torch.tensor([p for e in episodes for p in e.logprobs])
        return cls(mask=mask, behaviour=behaviour)

    def empty_share(self, most: int | None = None) -> float:
        """Share of a batch's possible action positions that no token fills: near 1 when responses collapse to a token or two.

        Args:
            most: Tokens that a response may have; None, or fewer than the longest has: as many as the longest has. Then
                responses that have all become equally short leave nothing empty.
        """
        rows, width = self.mask.shape
        return 1.0 - self.mask.sum().item() / (rows * max(width, most or 0))


def micro_batches(
    continuations: Sequence[Continuation],
    chosen: Sequence[int],
    *,
    max_tokens: int,
    width: int,
    share_prompts: bool = False,
) -> list[MicroBatch]:
    """Packs the chosen continuations into as few micro-batches as the budget and their order allow.

    They are sorted by length, ties by their index, and cut wherever one more would exceed the
    budget. The same input gives the same micro-batches. One longer than the budget gets a
    micro-batch of its own.

    Args:
        continuations: the batch.
        chosen: indices into it.
        max_tokens: most tokens of one micro-batch.
        width: T of the batch's rows.
        share_prompts: a prompt of several is read once for all of them that fit in one micro-batch, where the model can do
            that and it pays.

    Raises:
        InvalidArgument: when the budget is not positive.
    """
    ordered = sorted(chosen)
    units = _of_one_prompt(continuations, ordered, max_tokens) if share_prompts else [[index] for index in ordered]
    groups = fill([_tokens(continuations, unit) for unit in units], max_tokens)
    return [_pack(continuations, [units[place] for place in group], width) for group in groups]


def pack_on(
    device: torch.device,
    continuations: Sequence[Continuation],
    chosen: Sequence[int],
    max_tokens: int,
    *,
    share_prompts: bool = False,
) -> list[MicroBatch]:
    """As `micro_batches`, on a device; their slots lead into rows of all continuations."""
    width = max(len(item.response) for item in continuations)
    made = micro_batches(continuations, chosen, max_tokens=max_tokens, width=width, share_prompts=share_prompts)
    return [batch.to(device) for batch in made]


def _of_one_prompt(continuations: Sequence[Continuation], chosen: Sequence[int], budget: int) -> list[list[int]]:
    """Groups of continuations whose prompts are the same, each within the budget; alone where sharing saves too little."""
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    left: dict[tuple[int, ...], int] = {}  # of the budget of a prompt's last group
    for index in chosen:
        prompt, own = tuple(continuations[index].prompt), len(continuations[index].response) - 1
        if prompt not in groups or own > left[prompt]:
            groups.setdefault(prompt, []).append([])
            left[prompt] = budget - len(prompt)
        groups[prompt][-1].append(index)
        left[prompt] -= own
    units: list[list[int]] = []
    for prompt, parts in groups.items():
        for group in parts:
            saved = len(prompt) * (len(group) - 1)
            pays = saved >= max(_LEAST_SAVED, _LEAST_SHARE * (saved + _tokens(continuations, group)))
            units += [group] if pays else [[index] for index in group]
    return units


def _tokens(continuations: Sequence[Continuation], unit: Sequence[int]) -> int:
    """That the model reads of continuations which share their prompt."""
    return len(continuations[unit[0]].prompt) + sum(len(continuations[index].response) - 1 for index in unit)


def _shape(continuations: Sequence[Continuation], unit: Sequence[int]) -> int | Branches:
    own = tuple(length for index in unit if (length := len(continuations[index].response) - 1))
    return Branches(len(continuations[unit[0]].prompt), own) if len(own) > 1 else _tokens(continuations, unit)


def _pack(continuations: Sequence[Continuation], units: Sequence[Sequence[int]], width: int) -> MicroBatch:
    tokens: list[int] = []
    positions: list[int] = []
    states: list[int] = []
    slots: list[int] = []
    targets: list[int] = []
    temperatures: list[float] = []
    for unit in units:
        prompt = continuations[unit[0]].prompt
        tokens += prompt
        positions += range(len(prompt))
        last = len(tokens) - 1
        for index in unit:
            item = continuations[index]
            count = len(item.response)
            states += [last, *range(len(tokens), len(tokens) + count - 1)]
            tokens += item.response[:-1]
            positions += range(len(prompt), len(prompt) + count - 1)
            slots += range(index * width, index * width + count)
            targets += item.response
            temperatures += [item.temperature] * count
    return MicroBatch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        runs=runs_of(_shape(continuations, unit) for unit in units),
        states=torch.tensor(states),
        targets=torch.tensor(targets),
        temperatures=torch.tensor(temperatures, dtype=torch.float32),
        slots=torch.tensor(slots),
    )
