"""What the conductor asks of the generation service when it measures."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from honed.conductor.sampling import CONCURRENCY, continuations
from honed.v1 import common_pb2, generation_pb2


class Stub:
    """Answers with the seed, and counts what is in flight."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.in_flight = self.most = 0

    async def Generate(self, request: Any, timeout: float) -> generation_pb2.GenerateResponse:
        self.requests.append(request)
        self.in_flight += request.best_of.candidates or 1
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(0)
        self.in_flight -= request.best_of.candidates or 1
        return generation_pb2.GenerateResponse(samples=[generation_pb2.Sample(text=str(request.sampling.seed))])


@pytest.mark.parametrize(("best_of", "seeds"), [(None, range(100)), (16, range(0, 1600, 16)), (64, range(0, 6400, 64))])
async def test_each_continuation_is_the_best_of_candidates_with_seeds_of_their_own(best_of: int | None, seeds: range) -> None:
    stub = Stub()
    prompts = [generation_pb2.Prompt(text=f"p{number}") for number in range(100)]
    rows = await continuations(stub, prompts, common_pb2.SamplingParams(max_tokens=4), best_of)  # type: ignore[arg-type]
    assert [row.text for row in rows] == [str(seed) for seed in seeds]
    assert {request.best_of.candidates for request in stub.requests} == {best_of or 0}
    assert stub.most <= max(CONCURRENCY, best_of or 1), "the service is not asked for more at once"
