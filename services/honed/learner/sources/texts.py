"""Texts for pretraining and demonstrations for supervised fine-tuning, as batches of continuations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from honed.kit.errors import InvalidArgument
from honed.learner.data.continuation import Demonstration
from honed.learner.sources.epochs import Epochs

Batch = Sequence[Demonstration]


def packed_texts(texts: Sequence[Sequence[int]], *, separator: int, width: int, rows: int, seed: int) -> Epochs[Batch]:
    """Blocks of `width` tokens without padding, `rows` a batch, without end: each epoch joins the texts in a new order.

    Every text begins with the separator, which is learned as the end of the one before. What does not fill the last batch of
    an epoch is left out of that epoch.

    Raises:
        InvalidArgument: when all texts together do not fill one batch.
    """
    if width < 2:
        raise InvalidArgument("width", f"a block of {width} has nothing to predict")
    lengths = torch.tensor([len(text) + 1 for text in texts])
    if not len(texts) or int(lengths.sum()) < width * rows:
        total = int(lengths.sum())
        raise InvalidArgument("texts", f"{total} tokens do not fill one batch of {rows} x {width}; use a smaller batch")
    tokens = torch.tensor([token for text in texts for token in (separator, *text)], dtype=torch.int32)
    starts = lengths.cumsum(0) - lengths

    def cut(order: Sequence[int]) -> Sequence[Batch]:
        index = torch.tensor(order)
        before = lengths[index].cumsum(0) - lengths[index]
        stream = tokens[torch.arange(len(tokens)) + torch.repeat_interleave(starts[index] - before, lengths[index])]
        return _Blocks(stream[: len(stream) // (width * rows) * width * rows].view(-1, rows, width))

    return Epochs(len(texts), cut, seed=seed)


def demonstrations(items: Sequence[Demonstration], *, rows: int, seed: int, epochs: int | None = None) -> Epochs[Batch]:
    """Batches of `rows` demonstrations; the last of an epoch may have fewer.

    Raises:
        InvalidArgument: when there are none.
    """

    def cut(order: Sequence[int]) -> Sequence[Batch]:
        return [[items[i] for i in order[start : start + rows]] for start in range(0, len(order), rows)]

    return Epochs(len(items), cut, seed=seed, epochs=epochs)


class _Blocks(Sequence[Batch]):
    """`[batches, rows, width]` tokens, made into Python's lists when a batch is asked for."""

    def __init__(self, blocks: Tensor) -> None:
        self._blocks = blocks

    @overload
    def __getitem__(self, number: int) -> Batch: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Batch]: ...

    def __getitem__(self, number: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(number, slice):
            return _Blocks(self._blocks[number])
        return [Demonstration(row[:1], row[1:]) for row in self._blocks[number].tolist()]

    def __len__(self) -> int:
        return len(self._blocks)
