"""RewardService: what applications and operators call."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from honed.kit.errors import InvalidArgument, root_cause
from honed.reward.batching import DynamicBatcher
from honed.reward.messages import item_input, result_message, reward_of, scorer_message
from honed.reward.promoter import Promoter
from honed.reward.registry import LoadedScorer, ScorerRegistry
from honed.reward.scorer import ScoringTokenizer
from honed.v1 import reward_pb2, reward_pb2_grpc

_STREAM_WINDOW: Final = 256  # items of one stream that are read and not answered: a slow batch slows its sender down
_PAGE: Final = 100


class RewardService(reward_pb2_grpc.RewardServiceServicer):
    """Scores by what the registry serves. gRPC cancels a handler whose caller left; the batcher then skips its items."""

    def __init__(
        self, batcher: DynamicBatcher, registry: ScorerRegistry, promoter: Promoter, tokenizer: Callable[[], ScoringTokenizer]
    ) -> None:
        """Serves what is loaded.

        Args:
            batcher: Scores.
            registry: What is loaded.
            promoter: Changes that, in all replicas.
            tokenizer: Gives the policy's tokenizer; raises Unavailable before it is loaded.
        """
        self._batcher = batcher
        self._registry = registry
        self._promoter = promoter
        self._tokenizer = tokenizer

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        """Scores a list; fails as a whole with the first item that fails."""
        tokenizer = self._tokenizer()
        results = await self._batcher.score_each([item_input(item, tokenizer) for item in request.items])
        rewards = [reward_of(result, index, f"items[{index}]") for index, result in enumerate(results)]
        return reward_pb2.ScoreResponse(
            results=[result_message(item.id, reward) for item, reward in zip(request.items, rewards, strict=True)]
        )

    async def StreamScore(
        self, request_iterator: AsyncIterator[reward_pb2.StreamScoreRequest], context: Any
    ) -> AsyncIterator[reward_pb2.StreamScoreResponse]:
        """Answers each item as soon as it is scored; the first failure ends the stream."""
        self._tokenizer()  # raises while nothing is loaded
        answers: asyncio.Queue[reward_pb2.ScoreResult | Exception | None] = asyncio.Queue()
        reader = asyncio.ensure_future(self._read_stream(request_iterator, answers))
        try:
            while (answer := await answers.get()) is not None:
                if isinstance(answer, Exception):
                    raise answer
                yield reward_pb2.StreamScoreResponse(result=answer)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def ListScorers(self, request: reward_pb2.ListScorersRequest, context: Any) -> reward_pb2.ListScorersResponse:
        """Lists what is in memory, by name, then version."""
        after = _read_page_token(request.page.page_token)
        scorers = [loaded for loaded in self._registry.scorers() if _order(loaded) > after]
        size = request.page.page_size or _PAGE
        page = scorers[:size]
        return reward_pb2.ListScorersResponse(
            scorers=[scorer_message(loaded) for loaded in page],
            next_page_token=_page_token(_order(page[-1])) if len(scorers) > size else "",
        )

    async def LoadScorer(self, request: reward_pb2.LoadScorerRequest, context: Any) -> reward_pb2.LoadScorerResponse:
        """Loads a version beside the serving one, in every replica."""
        loaded = await self._promoter.load(request.name, request.source, request.idempotency_key)
        return reward_pb2.LoadScorerResponse(scorer=scorer_message(loaded))

    async def PromoteScorer(self, request: reward_pb2.PromoteScorerRequest, context: Any) -> reward_pb2.PromoteScorerResponse:
        """Makes a loaded version serve from the next batch on, in every replica."""
        loaded, previous, replicas = await self._promoter.promote(request.name, request.version, request.idempotency_key)
        return reward_pb2.PromoteScorerResponse(serving=scorer_message(loaded), previous_version=previous, replicas=replicas)

    async def _read_stream(
        self,
        requests: AsyncIterator[reward_pb2.StreamScoreRequest],
        answers: asyncio.Queue[reward_pb2.ScoreResult | Exception | None],
    ) -> None:
        """Puts an answer for each item into `answers`, then None. Errors are answers, so that the group never fails."""
        window = asyncio.Semaphore(_STREAM_WINDOW)
        tokenizer = self._tokenizer()

        async def score(item: reward_pb2.ScoreItem, index: int) -> None:
            try:
                [result] = await self._batcher.score_each([item_input(item, tokenizer)], patient=True)
                reward = reward_of(result, index, f"item {item.id!r} (number {index} of the stream)")
                answers.put_nowait(result_message(item.id, reward))
            except Exception as error:
                answers.put_nowait(error)
            finally:
                window.release()

        try:
            async with asyncio.TaskGroup() as group:
                index = 0
                async for request in requests:
                    await window.acquire()
                    group.create_task(score(request.item, index))
                    index += 1
            answers.put_nowait(None)
        except Exception as error:
            # The requests themselves raise here, for example one that breaks the contract: as a group of one.
            cause = root_cause(error)
            answers.put_nowait(cause if isinstance(cause, Exception) else error)


def _order(loaded: LoadedScorer) -> tuple[str, str]:
    return loaded.scorer.name, loaded.scorer.version


def _page_token(last: tuple[str, str]) -> str:
    return base64.urlsafe_b64encode("\n".join(last).encode()).decode()


def _read_page_token(token: str) -> tuple[str, str]:
    if not token:
        return "", ""
    try:
        name, version = base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode().split("\n")
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument("page.page_token", "not a token of this service; use next_page_token as it came") from error
    return name, version
