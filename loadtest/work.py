"""The requests of a benchmark: the same ones for each side, from a seed."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

PROMPT_TOKENS = 8

# Common words, so that any tokenizer has tokens for them.
_WORDS = """
    the a this that one some film story book day man woman child house city road water light night morning time year world
    is was has had makes takes gives finds keeps turns runs begins ends never always often still almost very quite too well
    good bad old new long short quiet bright slow quick great small and or but because with without about from into over
""".split()  # noqa: SIM905  # a list of strings would fill a page


@dataclass(frozen=True, slots=True)
class Work:
    """One request: its prompt's token ids, and exactly how many tokens to sample."""

    prompt: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A list of requests, small enough to travel.

    Attributes:
        seed: Decides all of it.
        requests: How many.
        shortest: The fewest tokens that one samples.
        longest: The most.
        vocabulary: Prompt ids are drawn from 1 to this less 1; 0 ends texts.
    """

    seed: int
    requests: int
    shortest: int
    longest: int
    vocabulary: int

    def work(self) -> list[Work]:
        """The requests. Prompts differ from each other, so no side is helped by the prefix cache."""
        rng = random.Random(self.seed)
        return [
            Work(
                tuple(rng.randrange(1, self.vocabulary) for _ in range(PROMPT_TOKENS)),
                rng.randint(self.shortest, self.longest),
            )
            for _ in range(self.requests)
        ]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def random_text(rng: random.Random, words: int) -> str:
    """Words in no order."""
    return " ".join(rng.choices(_WORDS, k=words))


def parse_range(text: str) -> tuple[int, int]:
    """Reads `64-128`, or `64` for both ends.

    Raises:
        ValueError: it is neither, or the ends are in the wrong order.
    """
    low, _, high = text.partition("-")
    try:
        ends = int(low), int(high or low)
    except ValueError:
        raise ValueError(f"{text!r} is not a range of tokens: write 64-128, or 64") from None
    if not 1 <= ends[0] <= ends[1]:
        raise ValueError(f"{text!r} must rise from at least 1")
    return ends
