"""Reviews to be continued, each prompt with what its author wrote as reference: data of a run whose reward is a text metric.

Texts, prompts and held-out prompts come from the parts of the human ratings that the demo has for them; no rating is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from honed.conductor.settings import DataSettings
from honed.recipes.made.base import Change, MadeData, Sampled, made, texts_and_prompts

SHORTEST, LONGEST = 4, 8
"""Words of a prompt."""
LEFT: Final = 6
"""Words that a reference has at least."""
HELD_OUT: Final = 256


@made("continuations")
class Continuations(MadeData):
    """Reviews, cut in two."""

    title = "first words of film reviews, with what follows them as reference"

    def files(self, directory: Path) -> DataSettings:
        """See `MadeData`."""
        return texts_and_prompts(directory, HELD_OUT)

    def write(self, directory: Path, seed: int) -> None:
        """See `MadeData`."""
        from honed.demo.data.openings import cut_in_two
        from honed.demo.data.split import texts_of
        from honed.demo.material import rating_split, text_rows, write_once

        def rows(part: Sequence[str]) -> Iterator[dict[str, Any]]:
            found = cut_in_two(part, seed=seed, shortest=SHORTEST, longest=LONGEST, left=LEFT)
            return ({"text": prompt, "reference": rest} for prompt, rest in found)

        split = rating_split(seed)
        write_once(directory / "texts.jsonl", text_rows(split.language_texts))
        write_once(directory / "prompts.jsonl", rows(texts_of(split.judge)))
        write_once(directory / "evaluation.jsonl", islice(rows(texts_of(split.held_out)), HELD_OUT))

    def measure(self, sampled: Sampled, seed: int) -> Sequence[Change]:
        """See `MadeData`."""
        return [Change("mean score against the reference (0 to 1)", *sampled.mean_rewards()), _rouge(sampled)]


def _rouge(sampled: Sampled) -> Change:
    """ROUGE-L, which no policy of these recipes climbs."""
    from honed.reward.function_scorer import Sample
    from honed.reward.text_metrics import Rouge

    rouge = Rouge()
    before, after = (
        sum(rouge([Sample(row.prompt, row.text, row.reference) for row in rows])) / len(rows)
        for rows in (sampled.before, sampled.after)
    )
    return Change("ROUGE-L (0 to 1)", before, after)
