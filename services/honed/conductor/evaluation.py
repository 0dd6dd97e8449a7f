"""What a run is measured by, on data that nothing trains on: agreement with held-out judgements, samples before and after.

A measure that fails is an alarm and a gap in the report; it never ends training.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import grpc

from honed.conductor.fleet import Fleet
from honed.conductor.sampling import (
    Continuation,
    continuations,
    prompts_of,
    read_continuations,
    training_sampling,
    write_continuations,
)
from honed.conductor.scoring import scores
from honed.conductor.settings import JudgementsFile
from honed.config import RunSettings
from honed.formats.files import Defaults, read_judgements
from honed.kit.errors import HonedError
from honed.report.measures import share_won
from honed.runtime import internal_channel
from honed.v1 import generation_pb2, generation_pb2_grpc, reward_pb2, reward_pb2_grpc
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

PAIRS = 20_000


@dataclass(frozen=True)
class Pair:
    """A comparison: one response was preferred to another."""

    prompt: str
    chosen: str
    rejected: str


@dataclass
class Agreement:
    """How far the reward orders held-out responses as people did; shares from 0 to 1."""

    pairs: int
    share: float
    by_scorer: dict[str, float] = field(default_factory=dict)


class Evaluation:
    """The measures of one run; each is taken once."""

    def __init__(self, settings: RunSettings, fleet: Fleet, workspace: Workspace) -> None:
        """Measures nothing yet."""
        self._settings, self._fleet = settings, fleet
        self._kept = workspace.conductor / "before.jsonl"
        self.agreement: Agreement | None = None
        self.base: list[Continuation] = []
        self.trained: list[Continuation] = []
        self.rewards_before: list[float] = []
        self.rewards_after: list[float] = []
        self.problem = ""

    async def before(self) -> None:
        """Measures agreement, and samples the base policy unless an earlier start of the run has done so."""
        await self._tolerant(self._before)

    async def after(self) -> None:
        """Samples the policy as it is served now, and scores both."""
        await self._tolerant(self._after)

    async def _before(self) -> None:
        evaluation = self._settings.data.evaluation
        if evaluation.prompts is not None:
            if self._kept.exists():
                self.base = await asyncio.to_thread(read_continuations, self._kept)
            else:
                self.base = await self._sample(evaluation.prompts)
                await asyncio.to_thread(write_continuations, self._kept, self.base)
        if evaluation.judgements is not None and self._settings.reward.scorers:
            pairs = await asyncio.to_thread(held_out_pairs, evaluation.judgements, PAIRS)
            self.agreement = await self._agreement(pairs)

    async def _after(self) -> None:
        evaluation = self._settings.data.evaluation
        if evaluation.prompts is None:
            return
        self.trained = await self._sample(evaluation.prompts, evaluation.best_of)
        if self._settings.reward.scorers:  # without a scorer there is no reward service
            self.rewards_before, self.rewards_after = await self._rewards(self.base), await self._rewards(self.trained)

    async def _sample(self, path: Path, best_of: int | None = None) -> list[Continuation]:
        prompts = await asyncio.to_thread(prompts_of, path, self._settings.data.evaluation.samples)
        async with internal_channel(self._settings, self._fleet.target("generation")) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            return await continuations(stub, prompts, training_sampling(self._settings), best_of)

    async def _rewards(self, rows: list[Continuation]) -> list[float]:
        items = [
            reward_pb2.ScoreItem(
                id=str(number),
                prompt=generation_pb2.Prompt(
                    token_ids=generation_pb2.TokenIds(ids=row.prompt_token_ids), reference=row.reference
                ),
                token_ids=generation_pb2.TokenIds(ids=row.token_ids),
            )
            for number, row in enumerate(rows)
            if row.token_ids
        ]
        async with internal_channel(self._settings, self._fleet.target("reward")) as channel:
            results = await scores(reward_pb2_grpc.RewardServiceStub(channel), items)
        return [result.reward for result in results]

    async def _agreement(self, pairs: list[Pair]) -> Agreement:
        texts = {(pair.prompt, text): None for pair in pairs for text in (pair.chosen, pair.rejected)}
        items = [
            reward_pb2.ScoreItem(id=str(number), prompt=generation_pb2.Prompt(text=prompt) if prompt else None, text=text)
            for number, (prompt, text) in enumerate(texts)
        ]
        async with internal_channel(self._settings, self._fleet.target("reward")) as channel:
            found = await scores(reward_pb2_grpc.RewardServiceStub(channel), items)
        results = dict(zip(texts, found, strict=True))
        ordered = [(results[p.prompt, p.chosen], results[p.prompt, p.rejected]) for p in pairs]
        names = {score.scorer for result in found for score in result.scores}

        def values(result: reward_pb2.ScoreResult, name: str) -> float:
            return next(score.value for score in result.scores if score.scorer == name)

        return Agreement(
            len(pairs),
            share_won((chosen.reward, rejected.reward) for chosen, rejected in ordered),
            {name: share_won((values(a, name), values(b, name)) for a, b in ordered) for name in sorted(names)},
        )

    async def _tolerant(self, measure: Callable[[], Awaitable[None]]) -> None:
        try:
            await measure()
        except* (grpc.aio.AioRpcError, HonedError, ValueError, OSError) as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
            self.problem = f"an evaluation failed, its figures are missing in the report: {reason}"
            logger.warning("an evaluation failed", extra={"reason": str(reason)})


def held_out_pairs(source: JudgementsFile, limit: int) -> list[Pair]:
    """The first comparisons of a file, those of rankings between neighbours; ties and other kinds say nothing of an order.

    Raises:
        HonedError: a line is no judgement; names file and line.
    """
    pairs: list[Pair] = []
    for pair in _pairs(source):
        if len(pairs) == limit:
            break
        pairs.append(pair)
    return pairs


def _pairs(source: JudgementsFile) -> Iterator[Pair]:
    for entry in read_judgements(source.file, source.format, Defaults(source.source, source.annotator)):
        judgement = entry.judgement
        texts = [response.text for response in judgement.responses]
        match judgement.WhichOneof("verdict"):
            case "pairwise" if not judgement.pairwise.tie:
                yield Pair(judgement.prompt, texts[judgement.pairwise.preferred], texts[judgement.pairwise.other])
            case "ranking":
                ranks = judgement.ranking.ranks
                order = sorted(range(len(texts)), key=lambda i, ranks=ranks: ranks[i])  # type: ignore[misc]
                for better, worse in pairwise(order):
                    if ranks[better] != ranks[worse]:
                        yield Pair(judgement.prompt, texts[better], texts[worse])
