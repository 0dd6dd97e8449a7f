"""The default run's data: human ratings fetched, split, and written as the files that a run file's `data` section names."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from honed.conductor.settings import DataSettings, EvaluationSettings, JudgementsFile
from honed.demo.data.comparisons import Comparison, draw_comparisons
from honed.demo.data.fetch import default_directory, fetch
from honed.demo.data.openings import first_words
from honed.demo.data.ratings import read_ratings
from honed.demo.data.split import Split, split, texts_of
from honed.kit.jsonl import write_lines

SOURCE: Final = "vader-movies"
SITTING: Final = 8
COMPARISONS: Final = 70_000
HELD_OUT_COMPARISONS: Final = 20_000
EVALUATION_PROMPTS: Final = 256


@dataclass(frozen=True)
class DemoData:
    """The ratings of one demo, and where its files lie."""

    split: Split
    seed: int

    def comparisons(self, count: int = COMPARISONS) -> Iterator[Comparison]:
        """Training comparisons, each between single ratings of two texts."""
        return itertools.islice(draw_comparisons(self.split.reward, seed=self.seed, sitting=SITTING), count)

    def held_out_comparisons(self) -> list[Comparison]:
        """Comparisons between texts that nothing trains on."""
        draws = draw_comparisons(self.split.held_out, seed=self.seed + 1)
        return list(itertools.islice(draws, HELD_OUT_COMPARISONS))


def demo_files(directory: Path) -> DataSettings:
    """The `data` section of a demo's run file: files under `directory`, which `write_demo_files` makes."""
    return DataSettings(
        texts=(directory / "texts.jsonl",),
        prompts=directory / "prompts.jsonl",
        judgements=(JudgementsFile(file=directory / "comparisons.jsonl", format="honed", source=SOURCE),),
        evaluation=EvaluationSettings(
            judgements=JudgementsFile(file=directory / "held-out.jsonl", format="honed", source=SOURCE),
            prompts=directory / "evaluation.jsonl",
            samples=EVALUATION_PROMPTS,
        ),
    )


def rating_split(seed: int) -> Split:
    """The ratings, fetched if they are not there, and split. Blocks.

    Raises:
        HonedError: the data cannot be fetched or is damaged; names the file and what to do.
    """
    return split(read_ratings(fetch(default_directory())), seed=seed)


def write_demo_files(directory: Path, seed: int) -> DemoData:
    """Fetches and splits the ratings, and writes the files of `demo_files` that are not there yet. Blocks.

    Raises:
        HonedError: the data cannot be fetched or is damaged; names the file and what to do.
    """
    data = write_shared_files(directory, seed)
    write_once(directory / "comparisons.jsonl", comparison_rows(data.comparisons(), f"{SOURCE}/{seed}"))
    return data


def write_shared_files(directory: Path, seed: int) -> DemoData:
    """The same, without the judgements to learn from.

    Raises:
        HonedError: as `write_demo_files`.
    """
    data = DemoData(rating_split(seed), seed)
    evaluation = first_words(texts_of(data.split.held_out), seed=seed)[:EVALUATION_PROMPTS]
    write_once(directory / "texts.jsonl", text_rows(data.split.language_texts))
    write_once(directory / "prompts.jsonl", text_rows(first_words(texts_of(data.split.judge), seed=seed)))
    write_once(directory / "evaluation.jsonl", text_rows(evaluation))
    write_once(directory / "held-out.jsonl", comparison_rows(data.held_out_comparisons(), f"{SOURCE}-held-out/{seed}"))
    return data


def write_once(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON lines, unless the file is there."""
    if not path.exists():
        write_lines(path, rows)


def text_rows(texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Texts, or prompts, as lines."""
    return ({"text": text} for text in texts)


def comparison_rows(comparisons: Iterable[Comparison], key: str) -> Iterator[dict[str, Any]]:
    """Comparisons as lines of honed's own format. Their raters are not known one by one: they share a name."""
    for number, comparison in enumerate(comparisons):
        yield {
            "idempotency_key": f"{key}/{number}",
            "judgement": {
                "responses": [{"text": comparison.chosen.text}, {"text": comparison.rejected.text}],
                "annotator": f"{SOURCE}-raters",
                "source": SOURCE,
                "labels": {"chosen": comparison.chosen.id, "rejected": comparison.rejected.id},
                "pairwise": {"preferred": 0, "other": 1},
            },
        }
