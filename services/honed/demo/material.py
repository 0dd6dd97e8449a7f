"""The default run's material: human ratings fetched, split, and turned into texts, prompts and comparisons."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from honed.config import RunSettings
from honed.demo.data.comparisons import Comparison, draw_comparisons
from honed.demo.data.fetch import fetch
from honed.demo.data.openings import first_words
from honed.demo.data.ratings import read_ratings
from honed.demo.data.split import Split, split, texts_of
from honed.kit.jsonl import write_lines
from honed.v1 import preference_pb2, preference_pb2_grpc
from honed.workspace import Workspace

SOURCE = "vader-movies"
SITTING = 8
HELD_OUT_COMPARISONS = 20_000


@dataclass(frozen=True)
class Material:
    """What a run on the human ratings works with."""

    split: Split
    seed: int

    def comparisons(self, count: int) -> Iterator[Comparison]:
        """Training comparisons, each between single ratings of two texts."""
        return itertools.islice(draw_comparisons(self.split.reward, seed=self.seed, sitting=SITTING), count)

    def held_out_comparisons(self) -> list[Comparison]:
        """Comparisons between texts that nothing trains on."""
        draws = draw_comparisons(self.split.held_out, seed=self.seed + 1)
        return list(itertools.islice(draws, HELD_OUT_COMPARISONS))


def prepare_material(settings: RunSettings) -> Material:
    """Fetches and splits the ratings, and writes the run's text and prompt files. Blocks; the files are made once.

    Raises:
        HonedError: the data cannot be fetched or is damaged; names the file and what to do.
    """
    archive = fetch(settings.data.cache.expanduser() / "data")
    parts = split(read_ratings(archive), seed=settings.seed, held_out=settings.data.held_out, judge=settings.data.judge)
    place = Workspace(settings.directory)
    evaluation = first_words(texts_of(parts.held_out), seed=settings.seed)[: settings.data.evaluation_prompts]
    files = {
        place.texts: parts.language_texts,
        place.prompts: first_words(texts_of(parts.judge), seed=settings.seed),
        place.evaluation_prompts: evaluation,
    }
    for path, texts in files.items():
        if not path.exists():
            write_lines(path, ({"text": text} for text in texts))
    return Material(parts, settings.seed)


async def import_comparisons(
    stub: preference_pb2_grpc.PreferenceServiceAsyncStub,
    material: Material,
    count: int,
    progress: Callable[[int], None] = lambda _: None,
) -> preference_pb2.ImportJudgementsResponse:
    """Streams comparisons into the preference service. Repeating it stores nothing twice."""

    async def requests() -> AsyncIterator[preference_pb2.ImportJudgementsRequest]:
        for number, comparison in enumerate(material.comparisons(count)):
            if number % 500 == 0:
                progress(number)
            yield preference_pb2.ImportJudgementsRequest(
                judgement=as_judgement(comparison), idempotency_key=f"{SOURCE}/{material.seed}/{number}"
            )

    answer: preference_pb2.ImportJudgementsResponse = await stub.ImportJudgements(requests(), timeout=300)
    progress(count)
    return answer


def as_judgement(comparison: Comparison) -> preference_pb2.Judgement:
    """A comparison of the data set as the contract's judgement. Its raters are not known one by one: they share a name."""
    return preference_pb2.Judgement(
        responses=[
            preference_pb2.JudgedResponse(text=comparison.chosen.text),
            preference_pb2.JudgedResponse(text=comparison.rejected.text),
        ],
        annotator=f"{SOURCE}-raters",
        source=SOURCE,
        labels={"chosen": comparison.chosen.id, "rejected": comparison.rejected.id},
        pairwise=preference_pb2.PairwiseJudgement(preferred=0, other=1),
    )
