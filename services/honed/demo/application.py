"""Calls the public endpoint as an application would, all through the loop."""

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

TRAFFIC_EVERY_S = 0.5
CALL_TIMEOUT_S = 60.0


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

    async def busy_seconds(self) -> float:
        """Seconds in which the generator was sampling, since its process started."""
        answer = await self._stub.GetPolicy(generation_pb2.GetPolicyRequest(), timeout=CALL_TIMEOUT_S)
        return float(answer.busy_seconds)

    async def keep_asking(self, prompts: Sequence[generation_pb2.Prompt]) -> None:
        """Sends a request now and then, whole and streamed in turn, until cancelled; counts what fails."""
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                group.create_task(self._ask(prompts[number % len(prompts)], number))
                await asyncio.sleep(TRAFFIC_EVERY_S)

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()

    async def _ask(self, prompt: generation_pb2.Prompt, number: int) -> None:
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

    def _request(self, prompt: generation_pb2.Prompt, seed: int) -> generation_pb2.GenerateRequest:
        sampling = common_pb2.SamplingParams()
        sampling.CopyFrom(self._sampling)
        sampling.seed = seed
        return generation_pb2.GenerateRequest(prompt=prompt, sampling=sampling, logprobs=True)
