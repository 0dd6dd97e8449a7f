"""The first 2 to 8 words of film reviews: prompts of a run whose reward is the sentiment of what follows.

Texts, prompts and held-out prompts come from the parts of the human ratings that the demo has for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from honed.conductor.settings import DataSettings
from honed.recipes.made.base import Change, MadeData, Sampled, made, texts_and_prompts

SHORTEST, LONGEST = 2, 8
"""Words of a prompt."""
HELD_OUT: Final = 256


@made("openings")
class Openings(MadeData):
    """Prompts without references and without judgements."""

    title = "the first 2 to 8 words of film reviews"

    def files(self, directory: Path) -> DataSettings:
        """See `MadeData`."""
        return texts_and_prompts(directory, HELD_OUT)

    def write(self, directory: Path, seed: int) -> None:
        """See `MadeData`."""
        from honed.demo.data.openings import first_words
        from honed.demo.data.split import texts_of
        from honed.demo.material import rating_split, text_rows, write_once

        def opened(part: list[str]) -> list[str]:
            return first_words(part, seed=seed, shortest=SHORTEST, longest=LONGEST)

        split = rating_split(seed)
        write_once(directory / "texts.jsonl", text_rows(split.language_texts))
        write_once(directory / "prompts.jsonl", text_rows(opened(texts_of(split.judge))))
        write_once(directory / "evaluation.jsonl", text_rows(opened(texts_of(split.held_out))[:HELD_OUT]))

    def held_out_texts(self, seed: int) -> Sequence[str]:
        """See `MadeData`."""
        from honed.recipes.made.ratings import held_out_texts

        return held_out_texts(seed)

    def measure(self, sampled: Sampled, seed: int) -> Sequence[Change]:
        """See `MadeData`."""
        from honed.recipes.made.ratings import judged

        return [Change("mean reward", *sampled.mean_rewards()), judged(sampled, seed)]
