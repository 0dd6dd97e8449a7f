"""Calls the public endpoint as an application would: for the before-and-after samples, and all through the loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from honed.kit.channel import connect
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc

logger = logging.getLogger(__name__)

CONCURRENCY = 48
TRAFFIC_EVERY_S = 0.5
CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Continuation:
    """What the policy made of a prompt."""

    prompt: str
    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version: str


@dataclass
class Traffic:
    """What became of the application's requests during the loop."""

    sent: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)


class Application:
    """A client with an application's token, on the public port."""

    def __init__(self, target: str, token: str | None, sampling: common_pb2.SamplingParams) -> None:
        """Samples by `sampling`, which the caller owns; each prompt gets its own seed."""
        self._channel = connect(target, token)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._sampling = sampling
        self.traffic = Traffic()

    async def continuations(self, prompts: Sequence[str]) -> list[Continuation]:
        """One continuation of each prompt; the same seeds at each call, so that only the policy differs."""
        room = asyncio.Semaphore(CONCURRENCY)

        async def one(number: int, prompt: str) -> Continuation:
            async with room:
                answer = await self._stub.Generate(self._request(prompt, seed=number), timeout=CALL_TIMEOUT_S)
            sample = answer.samples[0]
            version = sample.version_spans[-1].version
            return Continuation(
                prompt,
                sample.text,
                tuple(answer.prompt_token_ids),
                tuple(sample.token_ids),
                tuple(sample.logprobs),
                f"{version.fence}.{version.step}",
            )

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(i, prompt)) for i, prompt in enumerate(prompts)]
        return [task.result() for task in tasks]

    async def busy_seconds(self) -> float:
        """Seconds in which the generator was sampling, since its process started."""
        answer = await self._stub.GetPolicy(generation_pb2.GetPolicyRequest(), timeout=CALL_TIMEOUT_S)
        return float(answer.busy_seconds)

    async def keep_asking(self, prompts: Sequence[str]) -> None:
        """Sends a request now and then, whole and streamed in turn, until cancelled; counts what fails."""
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                group.create_task(self._ask(prompts[number % len(prompts)], number))
                await asyncio.sleep(TRAFFIC_EVERY_S)

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()

    async def _ask(self, prompt: str, number: int) -> None:
        self.traffic.sent += 1
        request = self._request(prompt, seed=number)
        try:
            if number % 2:
                streamed = generation_pb2.StreamGenerateRequest(prompt=request.prompt, sampling=request.sampling)
                async for _ in self._stub.StreamGenerate(streamed, timeout=CALL_TIMEOUT_S):
                    pass
            else:
                await self._stub.Generate(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            self.traffic.failed += 1
            self.traffic.errors.append(f"{error.code().name}: {error.details()}")
            logger.warning("an application's request failed", extra={"reason": self.traffic.errors[-1]})

    def _request(self, prompt: str, seed: int) -> generation_pb2.GenerateRequest:
        sampling = common_pb2.SamplingParams()
        sampling.CopyFrom(self._sampling)
        sampling.seed = seed
        return generation_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text=prompt), sampling=sampling, logprobs=True)
