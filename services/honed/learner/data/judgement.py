"""Judgements of people as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from honed.kit.errors import InvalidArgument

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Ranking:
    """One judgement: responses to a prompt, best first. Two of them are a comparison.

    Attributes:
        prompt: its token ids with what the tokenizer puts in front of a text; that alone for texts
            that stand alone.
        responses: token ids of each response, without special tokens.
        ranks: of each response, rising, equal where they tie; empty where all differ.
        margin: how far apart the scores of two should at least be.
        weight: how much it counts.
    """

    prompt: Tokens
    responses: tuple[Tokens, ...]
    ranks: tuple[int, ...] = ()
    margin: float = 0.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Checks that there is something to compare."""
        if len(self.responses) < 2 or not all(self.prompt + response for response in self.responses):
            raise InvalidArgument("responses", "a ranking needs at least two responses, and each some token to read")

    @property
    def texts(self) -> list[Tokens]:
        """Prompt and response together, of each response."""
        return [self.prompt + response for response in self.responses]


@dataclass(frozen=True)
class Rating:
    """One judgement: a response and the number that a person gave it; `weight` is how much it counts."""

    prompt: Tokens
    response: Tokens
    value: float
    weight: float = 1.0

    @property
    def texts(self) -> list[Tokens]:
        """Prompt and response together: one text."""
        return [self.prompt + self.response]


Judgement = Ranking | Rating


@dataclass(frozen=True)
class SharedTexts:
    """Judgements and their different texts; each judgement with where its texts stand in `texts`."""

    texts: tuple[Tokens, ...]
    rankings: tuple[tuple[tuple[int, ...], Ranking], ...]
    ratings: tuple[tuple[int, Rating], ...]

    @classmethod
    def of(cls, judgements: Sequence[Judgement]) -> SharedTexts:
        """Finds the texts, in the order in which they come first."""
        index: dict[Tokens, int] = {}
        rankings: list[tuple[tuple[int, ...], Ranking]] = []
        ratings: list[tuple[int, Rating]] = []
        for judgement in judgements:
            places = tuple(index.setdefault(text, len(index)) for text in judgement.texts)
            if isinstance(judgement, Ranking):
                rankings.append((places, judgement))
            else:
                ratings.append((places[0], judgement))
        return cls(tuple(index), tuple(rankings), tuple(ratings))


def batch_judgements(judgements: Iterable[Judgement], *, texts: int) -> list[list[Judgement]]:
    """Cuts the judgements, in order, where a batch would get more than `texts` different texts.

    A judgement that has more texts than that makes a batch alone. Every judgement lands in exactly
    one batch.
    """
    batches: list[list[Judgement]] = []
    seen: set[Tokens] = set()
    for judgement in judgements:
        if not batches or len(seen.union(judgement.texts)) > texts:
            batches.append([])
            seen = set()
        batches[-1].append(judgement)
        seen.update(judgement.texts)
    return batches
