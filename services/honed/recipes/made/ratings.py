"""The demo's human ratings: texts, prompts of their first words, and comparisons between single ratings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from honed.conductor.settings import DataSettings
from honed.recipes.made.base import Change, MadeData, Sampled, made

HELD_OUT_TEXTS: Final = 500
"""Of them it is measured how well a policy still knows what people write."""


@made("ratings")
class Ratings(MadeData):
    """What `honed demo` learns from."""

    title = "the demo's human ratings: texts, prompts, comparisons"
    sources = ("vader-movies",)

    def files(self, directory: Path) -> DataSettings:
        """See `MadeData`."""
        from honed.demo.material import demo_files

        return demo_files(directory)

    def write(self, directory: Path, seed: int) -> None:
        """See `MadeData`."""
        from honed.demo.material import write_demo_files

        write_demo_files(directory, seed)

    def held_out_texts(self, seed: int) -> Sequence[str]:
        """See `MadeData`."""
        return held_out_texts(seed)

    def measure(self, sampled: Sampled, seed: int) -> Sequence[Change]:
        """See `MadeData`."""
        return [judged(sampled, seed)]


def held_out_texts(seed: int) -> Sequence[str]:
    """The film reviews that nothing trains on."""
    from honed.demo.data.split import texts_of
    from honed.demo.material import rating_split

    return texts_of(rating_split(seed).held_out)[:HELD_OUT_TEXTS]


def judged(sampled: Sampled, seed: int) -> Change:
    """The mean rating of the continuations by a judge that nothing trains on and that read other texts than they came from."""
    from honed.demo.judge import RidgeJudge
    from honed.demo.material import rating_split

    judge = RidgeJudge.train(rating_split(seed).judge)
    before, after = (judge.mean_rating([row.text for row in rows]) for rows in (sampled.before, sampled.after))
    return Change("judge's mean rating (-4 to 4)", before, after)
