"""RewardService: what applications and operators call."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from typing import Any, Final

from honed.kit.errors import InvalidArgument
from honed.models.chat import ChatMessage
from honed.reward.batching import DynamicBatcher, Result
from honed.reward.registry import LoadedScorer, ScorerRegistry
from honed.reward.reward import Reward
from honed.reward.scorer import BadSample, ScorerFailed, ScorerInput, TokenCodec
from honed.v1 import common_pb2, generation_pb2, reward_pb2, reward_pb2_grpc

_STREAM_WINDOW: Final = 256  # items of one stream that are read and not answered: a slow batch slows its sender down
_PAGE: Final = 100


class RewardService(reward_pb2_grpc.RewardServiceServicer):
    """Scores by what the registry serves. gRPC cancels a handler whose caller left; the batcher then skips its items."""

    def __init__(self, batcher: DynamicBatcher, registry: ScorerRegistry, codec: TokenCodec) -> None:
        """`codec` is the policy's tokenizer."""
        self._batcher = batcher
        self._registry = registry
        self._codec = codec

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        """Scores a list; fails as a whole with the first item that fails."""
        results = await self._batcher.score_each([self._input(item) for item in request.items])
        rewards = [_reward(result, index, f"items[{index}]") for index, result in enumerate(results)]
        return reward_pb2.ScoreResponse(
            results=[_result(item.id, reward) for item, reward in zip(request.items, rewards, strict=True)]
        )

    async def StreamScore(
        self, request_iterator: AsyncIterator[reward_pb2.StreamScoreRequest], context: Any
    ) -> AsyncIterator[reward_pb2.StreamScoreResponse]:
        """Answers each item as soon as it is scored; the first failure ends the stream."""
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
        scorers = [loaded for loaded in self._registry.scorers() if _place(loaded) > after]
        size = request.page.page_size or _PAGE
        page = scorers[:size]
        return reward_pb2.ListScorersResponse(
            scorers=[_info(loaded) for loaded in page],
            next_page_token=_page_token(_place(page[-1])) if len(scorers) > size else "",
        )

    async def LoadScorer(self, request: reward_pb2.LoadScorerRequest, context: Any) -> reward_pb2.LoadScorerResponse:
        """Loads a version beside the serving one."""
        loaded = await self._registry.load(request.name, request.source, request.idempotency_key)
        return reward_pb2.LoadScorerResponse(scorer=_info(loaded))

    async def PromoteScorer(self, request: reward_pb2.PromoteScorerRequest, context: Any) -> reward_pb2.PromoteScorerResponse:
        """Makes a loaded version serve from the next batch on."""
        serving, previous = await self._registry.promote(request.name, request.version, request.idempotency_key)
        return reward_pb2.PromoteScorerResponse(serving=_info(serving), previous_version=previous)

    async def _read_stream(
        self,
        requests: AsyncIterator[reward_pb2.StreamScoreRequest],
        answers: asyncio.Queue[reward_pb2.ScoreResult | Exception | None],
    ) -> None:
        """Puts an answer for each item into `answers`, then None. Errors are answers, so that the group never fails."""
        window = asyncio.Semaphore(_STREAM_WINDOW)

        async def score(item: reward_pb2.ScoreItem, index: int) -> None:
            try:
                [result] = await self._batcher.score_each([self._input(item)], patient=True)
                answers.put_nowait(_result(item.id, _reward(result, index, f"item {item.id!r} (number {index} of the stream)")))
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
        except ExceptionGroup as failed:  # the tasks catch their own: this is an item that could not be read
            answers.put_nowait(failed.exceptions[0])
        except Exception as error:
            answers.put_nowait(error)

    def _input(self, item: reward_pb2.ScoreItem) -> ScorerInput:
        prompt, response = item.prompt.WhichOneof("content"), item.WhichOneof("response")
        return ScorerInput(
            self._codec,
            prompt_tokens=tuple(item.prompt.token_ids.ids) if prompt == "token_ids" else None,
            prompt=item.prompt.text if prompt == "text" else None,
            messages=_messages(item.prompt.messages) if prompt == "messages" else None,
            response_tokens=tuple(item.token_ids.ids) if response == "token_ids" else None,
            response=item.text if response == "text" else None,
        )


def score_messages(reward: Reward) -> list[common_pb2.Score]:
    """The scores behind a reward, as the contract states them."""
    return [
        common_pb2.Score(
            scorer=score.scorer,
            scorer_version=score.version,
            value=score.value,
            weight=score.weight,
            truncated_tokens=score.truncated_tokens,
        )
        for score in reward.scores
    ]


def _messages(messages: generation_pb2.ChatMessages) -> tuple[ChatMessage, ...]:
    return tuple(ChatMessage(message.role, message.content) for message in messages.messages)


def _reward(result: Result, index: int, place: str) -> Reward:
    """The reward, or the error told in the caller's terms."""
    if isinstance(result, BadSample):
        raise InvalidArgument(place, result.reason) from result
    if isinstance(result, ScorerFailed):
        raise result.at(index) from result
    if isinstance(result, InvalidArgument):
        raise InvalidArgument(f"{place}.{result.field}", result.reason) from result
    if isinstance(result, Exception):
        raise result
    return result


def _result(item_id: str, reward: Reward) -> reward_pb2.ScoreResult:
    return reward_pb2.ScoreResult(id=item_id, reward=reward.value, scores=score_messages(reward))


def _info(loaded: LoadedScorer) -> reward_pb2.ScorerInfo:
    scorer = loaded.scorer
    return reward_pb2.ScorerInfo(
        name=scorer.name,
        version=scorer.version,
        kind=scorer.kind,
        weight=loaded.weight,
        state=reward_pb2.SCORER_STATE_SERVING if loaded.serving else reward_pb2.SCORER_STATE_LOADED,
        max_tokens=scorer.max_tokens,
    )


def _place(loaded: LoadedScorer) -> tuple[str, str]:
    return loaded.scorer.name, loaded.scorer.version


def _page_token(place: tuple[str, str]) -> str:
    return base64.urlsafe_b64encode("\n".join(place).encode()).decode()


def _read_page_token(token: str) -> tuple[str, str]:
    if not token:
        return "", ""
    try:
        name, version = base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode().split("\n")
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument("page.page_token", "not a token of this service; use next_page_token as it came") from error
    return name, version
