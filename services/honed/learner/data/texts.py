"""Turns tokenised texts into batches: packed blocks for pretraining, padded and masked ones for fine-tuning.

Padding stands on the right and carries no loss. A causal model never looks to the right, so it needs no attention mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from honed.kit.errors import InvalidArgument

IGNORED = -100
"""The label of a position that has no loss; the default of torch's cross-entropy."""


@dataclass(frozen=True)
class TokenBatch:
    """Sequences and what each position must predict.

    Attributes:
        tokens: `[rows, width]` int64.
        labels: `[rows, width]` int64, the token at the same position, or `IGNORED`; each is predicted from those before it.
    """

    tokens: Tensor
    labels: Tensor

    @property
    def predictions(self) -> int:
        """Positions that have a loss. The first one of a row has nothing to be predicted from."""
        return int((self.labels[:, 1:] != IGNORED).sum())


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to learn, as token ids without special tokens."""

    prompt: Sequence[int]
    response: Sequence[int]


def packed_batches(
    texts: Sequence[Sequence[int]], *, separator: int, width: int, rows: int, rng: torch.Generator
) -> Iterator[TokenBatch]:
    """Yields batches without end: each epoch shuffles the texts, joins them by `separator` and cuts blocks of `width`.

    Every text begins with the separator. What does not fill the last batch of an epoch is left out of that epoch.

    Raises:
        InvalidArgument: when all texts together do not fill one batch.
    """
    total = sum(len(text) + 1 for text in texts)
    if total < width * rows:
        raise InvalidArgument("texts", f"{total} tokens do not fill one batch of {rows} x {width}; use a smaller batch")
    return _packed(texts, separator, width, rows, rng)


def _packed(
    texts: Sequence[Sequence[int]], separator: int, width: int, rows: int, rng: torch.Generator
) -> Iterator[TokenBatch]:
    while True:
        stream: list[int] = []
        for index in torch.randperm(len(texts), generator=rng).tolist():
            stream.append(separator)
            stream.extend(texts[index])
        batches = len(stream) // (width * rows)
        blocks = torch.tensor(stream[: batches * width * rows]).view(batches, rows, width)
        for block in blocks:
            yield TokenBatch(block, block)


def demonstration_batches(
    demonstrations: Sequence[Demonstration], *, separator: int, width: int, rows: int, rng: torch.Generator
) -> Iterator[TokenBatch]:
    """Yields batches without end for supervised fine-tuning: only the response and the separator that ends it have a loss.

    A row is separator, prompt, response, separator. One longer than `width` loses the end of its response.

    Raises:
        InvalidArgument: when there are no demonstrations, or a prompt leaves no room for its response.
    """
    if not demonstrations:
        raise InvalidArgument("demonstrations", "there are none")
    for number, item in enumerate(demonstrations):
        if len(item.prompt) + 2 > width:
            raise InvalidArgument(
                f"demonstrations[{number}].prompt", f"{len(item.prompt)} tokens leave no room for a response in {width}"
            )
    return _demonstrated(demonstrations, separator, width, rows, rng)


def _demonstrated(
    demonstrations: Sequence[Demonstration], separator: int, width: int, rows: int, rng: torch.Generator
) -> Iterator[TokenBatch]:
    while True:
        order = torch.randperm(len(demonstrations), generator=rng).tolist()
        for start in range(0, len(order), rows):
            chosen = [demonstrations[i] for i in order[start : start + rows]]
            sequences = [[separator, *item.prompt, *item.response, separator][:width] for item in chosen]
            tokens = pad_right(sequences, filler=separator)
            labels = tokens.clone()
            for row, (item, sequence) in enumerate(zip(chosen, sequences, strict=True)):
                labels[row, : len(item.prompt) + 1] = IGNORED
                labels[row, len(sequence) :] = IGNORED
            yield TokenBatch(tokens, labels)


def pad_right(sequences: Iterable[Sequence[int]], *, filler: int = 0) -> Tensor:
    """`[rows, longest]` int64. The filler is any token: whoever reads the result keeps the lengths."""
    rows = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
