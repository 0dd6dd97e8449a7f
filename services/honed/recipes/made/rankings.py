"""Demonstrations, and rankings of 4 to 9 texts each: data of a run that is fine-tuned, ranked and then trained online.

Rated film reviews stand for what InstructGPT's labelers wrote and ranked. A demonstration is one of the best-rated reviews: its
first words are the prompt, the others the response. A ranking orders reviews by one rating of each, drawn from all that people
gave, and has no ties. The held-out comparisons and prompts are the demo's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from honed.conductor.settings import DataSettings, JudgementsFile
from honed.recipes.made.base import Change, MadeData, Sampled, made

if TYPE_CHECKING:
    from honed.demo.data.ratings import RatedText

SOURCE: Final = "vader-rankings"
DEMONSTRATIONS: Final = 1_000
RANKINGS: Final = 3_000
FEWEST, MOST = 4, 9
"""Texts of a ranking."""


@made("rankings")
class Rankings(MadeData):
    """What InstructGPT's three steps need."""

    title = "demonstrations of the best-rated reviews, and rankings of 4 to 9 of them"
    sources = (SOURCE,)

    def files(self, directory: Path) -> DataSettings:
        """See `MadeData`."""
        from honed.demo.material import demo_files

        return demo_files(directory).model_copy(
            update={
                "demonstrations": (directory / "demonstrations.jsonl",),
                "judgements": (JudgementsFile(file=directory / "rankings.jsonl", format="honed", source=SOURCE),),
            }
        )

    def write(self, directory: Path, seed: int) -> None:
        """See `MadeData`."""
        from honed.demo.material import write_once, write_shared_files

        rated = write_shared_files(directory, seed).split.reward
        write_once(directory / "demonstrations.jsonl", demonstrations(rated, seed=seed))
        write_once(directory / "rankings.jsonl", rankings(rated, seed=seed))

    def held_out_texts(self, seed: int) -> Sequence[str]:
        """See `MadeData`."""
        from honed.recipes.made.ratings import held_out_texts

        return held_out_texts(seed)

    def measure(self, sampled: Sampled, seed: int) -> Sequence[Change]:
        """See `MadeData`."""
        from honed.recipes.made.ratings import judged

        return [judged(sampled, seed)]


def demonstrations(rated: Sequence[RatedText], *, seed: int, count: int = DEMONSTRATIONS) -> Iterator[dict[str, Any]]:
    """The best-rated texts as prompts and responses, the best first; one with no word behind its prompt is left out."""
    from honed.demo.data.openings import cut_in_two

    best = sorted(rated, key=lambda item: (-item.mean_rating, item.id))[:count]
    for prompt, rest in cut_in_two((item.text for item in best), seed=seed, shortest=3, longest=6, left=1):
        yield {"text": prompt, "response": rest}


def rankings(rated: Sequence[RatedText], *, seed: int, count: int = RANKINGS) -> Iterator[dict[str, Any]]:
    """Judgements that rank texts, as lines of honed's own format.

    Texts are dealt in rounds, as comparisons are: in each, a text is dealt once. Of those that got the same rating the first
    stays, since a tie orders nothing; what leaves fewer than `FEWEST` is dealt again.
    """
    chance, order, written = random.Random(seed), list["RatedText"](), 0
    while written < count:
        if len(order) < MOST:
            order = chance.sample(list(rated), len(rated))
        dealt, order = order[:MOST], order[MOST:]
        by_rating: dict[int, RatedText] = {}
        for item in dealt:
            by_rating.setdefault(chance.choice(item.ratings), item)
        if len(by_rating) < FEWEST:
            continue
        levels = sorted(by_rating, reverse=True)
        yield {
            "idempotency_key": f"{SOURCE}/{seed}/{written}",
            "judgement": {
                "responses": [{"text": item.text} for item in by_rating.values()],
                "annotator": f"{SOURCE}-raters",
                "source": SOURCE,
                "ranking": {"ranks": [levels.index(rating) for rating in by_rating]},
            },
        }
        written += 1
