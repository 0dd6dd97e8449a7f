"""Sums to answer: data of a run whose reward is a rule, for a language model that has seen right answers and others.

A line in four says `7 + 5 = 12`, and is right one time in seven; others say the first number, the second or the difference. The
other lines say before which of the four it is (`sum: 7 + 5 = 12`): so the base model knows how to add, and seldom does where
nothing says so. The sums of the held-out prompts stand in the texts as all others do; no rollout asks for them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from honed.conductor.settings import DataSettings, EvaluationSettings
from honed.kit.jsonl import write_lines
from honed.recipes.made.base import Change, MadeData, Sampled, made

NUMBERS: Final = range(1, 16)
"""From 1 on, so that no sum is one of its numbers or their difference."""
LINES: Final = 40_000
TOLD: Final = 3 / 4
"""Share of the lines that say which answer they give."""
RIGHT: Final = 1 / 7
"""Share of sums among the other lines."""
HELD_OUT: Final = 40
ASKED_AGAIN: Final = 5
"""How often each held-out sum is sampled: its share of right answers is a probability."""


@made("sums")
class Sums(MadeData):
    """Sums of two numbers, each prompt with its answer as reference."""

    title = "sums of two numbers, with their answers"
    prose = False

    def files(self, directory: Path) -> DataSettings:
        """See `MadeData`."""
        return DataSettings(
            texts=(directory / "texts.jsonl",),
            prompts=directory / "prompts.jsonl",
            evaluation=EvaluationSettings(prompts=directory / "evaluation.jsonl", samples=HELD_OUT * ASKED_AGAIN),
        )

    def write(self, directory: Path, seed: int) -> None:
        """See `MadeData`."""
        chance = random.Random(seed)
        pairs = [(a, b) for a in NUMBERS for b in NUMBERS]
        chance.shuffle(pairs)
        write_lines(directory / "texts.jsonl", ({"text": _line(chance)} for _ in range(LINES)))
        write_lines(directory / "evaluation.jsonl", _prompts(pairs[:HELD_OUT] * ASKED_AGAIN))
        write_lines(directory / "prompts.jsonl", _prompts(pairs[HELD_OUT:]))

    def measure(self, sampled: Sampled, seed: int) -> list[Change]:
        """See `MadeData`."""
        before, after = sampled.mean_rewards()
        return [Change("right answers to held-out sums (share)", before, after)]


def _line(chance: random.Random) -> str:
    a, b = chance.choice(NUMBERS), chance.choice(NUMBERS)
    answers = {"first": a, "second": b, "difference": abs(a - b), "sum": a + b}
    if chance.random() < TOLD:
        named = chance.choice(sorted(answers))
        return f"{named}: {a} + {b} = {answers[named]}"
    named = "sum" if chance.random() < RIGHT else chance.choice(["first", "second", "difference"])
    return f"{a} + {b} = {answers[named]}"


def _prompts(pairs: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    return ({"text": f"{a} + {b} =", "reference": str(a + b)} for a, b in pairs)
