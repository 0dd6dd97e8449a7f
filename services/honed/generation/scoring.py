"""Asks the run's reward service what the candidates of one request are worth.

Nothing is opened before the first request: without best-of-n a generator has no channel to the reward service, and a reward
service that is out of order stops nothing else here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Final, TypeVar

import grpc

from honed.config import RunSettings
from honed.kit.errors import DeadlineExceeded, FailedPrecondition, HonedError, InvalidArgument, Overloaded, Unavailable
from honed.kit.status import retry_after_s
from honed.runtime import internal_channel, leads_nowhere
from honed.v1 import common_pb2, reward_pb2, reward_pb2_grpc

T = TypeVar("T")

_PAUSE_S: Final = 0.5
"""Before a reward service that is full is asked again, where it does not say when."""
_PAGE: Final = 1000
_DOWN: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
_NOT_LET_IN: Final = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class CandidateScoring:
    """A client of the reward service. Belongs to one event loop."""

    def __init__(self, settings: RunSettings) -> None:
        """Opens nothing; `settings` say where the reward service is, and how long scoring may take."""
        self._settings = settings
        self._timeout_s = settings.generation.scoring_timeout_s
        self._target = settings.reward.target
        self._channel: grpc.aio.Channel | None = None

    async def check(self, scorer: str) -> None:
        """Asserts that there is a reward, and that `scorer` is part of it if it is not empty; before anything is sampled.

        Raises:
            FailedPrecondition: The run has no scorers, or the reward service cannot be called as things are set.
            InvalidArgument: There is no scorer of that name; names those that there are.
            Unavailable: The reward service does not answer, or has loaded nothing yet.
            DeadlineExceeded: It does not answer in time.
        """
        stub = self._stub()
        request = reward_pb2.ListScorersRequest(page=common_pb2.PageRequest(page_size=_PAGE))
        answer = await self._within_time(lambda: stub.ListScorers(request, timeout=self._timeout_s))
        names = {found.name for found in answer.scorers if found.state == reward_pb2.SCORER_STATE_SERVING}
        if not names:
            raise Unavailable(f"the reward service at {self._target} has loaded no scorer yet; a retry is safe")
        if scorer and scorer not in names:
            raise unknown_scorer(scorer, names)

    async def score(self, items: Sequence[reward_pb2.ScoreItem]) -> list[reward_pb2.ScoreResult]:
        """The result of each item, in order, all by the same versions of the scorers.

        A service that is full is asked again. So is one that has promoted a scorer meanwhile: values of two versions cannot be
        compared.

        Raises:
            InvalidArgument: A scorer refuses a candidate, for lack of a reference say.
            Overloaded: The reward service was full for as long as scoring may take.
            HonedError: As `check` does; or a scorer failed.
        """
        stub = self._stub()
        request = reward_pb2.ScoreRequest(items=items)

        async def scored() -> list[reward_pb2.ScoreResult]:
            while True:
                answer = await stub.Score(request, timeout=self._timeout_s)
                results: list[reward_pb2.ScoreResult] = list(answer.results)
                if len({tuple((s.scorer, s.scorer_version) for s in result.scores) for result in results}) == 1:
                    return results

        return await self._within_time(scored)

    async def close(self) -> None:
        """Closes the channel, if one was opened."""
        if self._channel is not None:
            await self._channel.close()

    def _stub(self) -> Any:
        if self._channel is None:
            reward = self._settings.reward
            if not reward.scorers:
                raise FailedPrecondition(
                    "best_of chooses by the run's reward, and this run has none: name scorers in reward.scorers of the run file"
                )
            if reward.address is None and leads_nowhere(reward.host, reward.port):
                raise FailedPrecondition(
                    f"best_of needs the reward service, and {self._target} leads nowhere: set reward.address for this generator"
                )
            try:
                self._channel = internal_channel(self._settings, self._target, "generation")
            except ValueError as error:
                raise FailedPrecondition(f"best_of needs the reward service, which cannot be called: {error}") from error
        return reward_pb2_grpc.RewardServiceStub(self._channel)

    async def _within_time(self, call: Callable[[], Awaitable[T]]) -> T:
        """Makes a call until it ends otherwise than with RESOURCE_EXHAUSTED.

        Raises:
            HonedError: Its failure, in the terms of whoever asked for the candidates.
        """
        full: Overloaded | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    try:
                        return await call()
                    except grpc.aio.AioRpcError as error:
                        failure = self._told(error)
                        if not isinstance(failure, Overloaded):
                            raise failure from error
                        full = failure
                    await asyncio.sleep(full.retry_after_s)
        except TimeoutError as error:
            raise full or self._late() from error

    def _told(self, error: grpc.aio.AioRpcError) -> HonedError:
        code, said = error.code(), error.details() or "no reason given"
        where = f"the reward service at {self._target}"
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidArgument("best_of", f"{where} cannot score the candidates: {said}")
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(f"{where} is full: {said}", retry_after_s(error) or _PAUSE_S)
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return self._late()
        if code in _DOWN:
            return Unavailable(f"{where} does not answer ({said}); a retry is safe")
        if code in _NOT_LET_IN:
            return FailedPrecondition(
                f"{where} refuses this generator ({said}): its token needs the scope `reward`, which token tables of an older "
                "honed do not give; make the tokens anew"
            )
        if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED):
            return FailedPrecondition(f"{where}: {said}")
        return HonedError(f"{where} failed: {said}")

    def _late(self) -> DeadlineExceeded:
        # Not UNAVAILABLE: gRPC repeats that by itself, and each time all candidates would be sampled again.
        return DeadlineExceeded(
            f"the reward service at {self._target} did not answer within {self._timeout_s:g} s (generation.scoring_timeout_s)"
        )


def unknown_scorer(scorer: str, names: Collection[str]) -> InvalidArgument:
    """The error about a scorer that is no part of the reward."""
    return InvalidArgument("best_of.scorer", f"there is no scorer {scorer!r}; there are {', '.join(sorted(names))}")
