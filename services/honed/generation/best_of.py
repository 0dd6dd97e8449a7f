"""Best-of-n: several candidates are sampled, and those that the reward service values most are returned."""

from __future__ import annotations

from collections.abc import Sequence

from honed.generation.frontend import SamplingFrontend
from honed.generation.requests import Chunk
from honed.generation.scoring import CandidateScoring, unknown_scorer
from honed.kit.errors import InvalidArgument
from honed.v1 import generation_pb2, reward_pb2

Request = generation_pb2.GenerateRequest | generation_pb2.StreamGenerateRequest


class BestOf:
    """Chooses among samples of the live policy."""

    def __init__(self, frontend: SamplingFrontend, scoring: CandidateScoring) -> None:
        """Candidates come from `frontend`, their values from `scoring`."""
        self._frontend = frontend
        self._scoring = scoring

    async def winners(self, request: Request) -> tuple[list[generation_pb2.Sample], Sequence[int]]:
        """The n best of a request's candidates, the best first; and the prompt's token ids.

        A caller that leaves ends the sampling and the scoring.

        Raises:
            InvalidArgument: A cap is exceeded, n is more than the candidates, or there is no such scorer.
            HonedError: As `SamplingFrontend.requests` and `CandidateScoring` do.
        """
        asked, n = request.best_of, request.n or 1
        if n > asked.candidates:
            raise InvalidArgument(
                "n", f"{n} responses cannot be chosen among {asked.candidates} candidates: ask for more of these"
            )
        # Before anything is sampled, so that a reward service that is not there costs no sampling.
        await self._scoring.check(asked.scorer)
        drawn = await self._frontend.requests(
            request.prompt,
            request.sampling,
            asked.candidates,
            text=True,
            logprobs=request.logprobs,
            field="best_of.candidates",
        )
        prompt = drawn[0].prompt_token_ids
        chunks = await self._frontend.complete(drawn)
        results = await self._scoring.score(
            [_item(index, prompt, request.prompt.reference, chunk) for index, chunk in enumerate(chunks)]
        )
        values = [_value(result, asked.scorer) for result in results]
        # Stable: of equal values the lower index is first.
        ranked = sorted(range(len(values)), key=lambda index: values[index], reverse=True)[:n]
        return [self._frontend.codec.scored_sample(index, chunks[index], results[index]) for index in ranked], prompt


def _item(index: int, prompt: Sequence[int], reference: str, chunk: Chunk) -> reward_pb2.ScoreItem:
    """A candidate as a rollout of the same prompt would be scored: by token ids on both sides."""
    item = reward_pb2.ScoreItem(
        id=str(index),
        prompt=generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=prompt), reference=reference),
    )
    item.token_ids.ids.extend(chunk.token_ids)
    return item


def _value(result: reward_pb2.ScoreResult, scorer: str) -> float:
    if not scorer:
        return result.reward
    values = {score.scorer: score.value for score in result.scores}
    if scorer not in values:  # the reward service was started anew meanwhile, with other scorers
        raise unknown_scorer(scorer, set(values))
    return values[scorer]
