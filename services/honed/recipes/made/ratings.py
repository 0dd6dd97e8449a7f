"""The demo's human ratings: texts, prompts of their first words, and comparisons between single ratings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from honed.conductor.settings import DataSettings
from honed.recipes.made.base import Change, MadeData, Sampled, made


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

    def measure(self, sampled: Sampled, seed: int) -> Sequence[Change]:
        """See `MadeData`."""
        return [judged(sampled, seed)]


def judged(sampled: Sampled, seed: int) -> Change:
    """The mean rating of the continuations by a judge that nothing trains on and that read other texts than they came from."""
    from honed.demo.judge import RidgeJudge
    from honed.demo.material import rating_split

    judge = RidgeJudge.train(rating_split(seed).judge)
    before, after = (judge.mean_rating([row.text for row in rows]) for rows in (sampled.before, sampled.after))
    return Change("judge's mean rating (-4 to 4)", before, after)
