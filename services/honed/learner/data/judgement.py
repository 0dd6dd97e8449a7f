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
    """

    prompt: Tokens
    responses: tuple[Tokens, ...]

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
    """One judgement: a response and the number that a person gave it."""

    prompt: Tokens
    response: Tokens
    value: float

    @property
    def texts(self) -> list[Tokens]:
        """Prompt and response together: one text."""
        return [self.prompt + self.response]


Judgement = Ranking | Rating


@dataclass(frozen=True)
class SharedTexts:
    """Judgements and their different texts; `rankings` and `ratings` point into `texts`."""

    texts: tuple[Tokens, ...]
    rankings: tuple[tuple[int, ...], ...]
    ratings: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, judgements: Sequence[Judgement]) -> SharedTexts:
        """Finds the texts, in the order in which they come first."""
        index: dict[Tokens, int] = {}
        places = [tuple(index.setdefault(text, len(index)) for text in judgement.texts) for judgement in judgements]
        pairs = list(zip(places, judgements, strict=True))
        return cls(
            tuple(index),
            tuple(place for place, judgement in pairs if isinstance(judgement, Ranking)),
            tuple((place[0], judgement.value) for place, judgement in pairs if isinstance(judgement, Rating)),
        )


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
