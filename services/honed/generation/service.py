"""GenerationService: what applications call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from honed.generation.sampler import Sampler
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Samples from the live policy. gRPC cancels a handler whose caller left; the sampler then frees the engine."""

    def __init__(self, sampler: Sampler) -> None:
        """Serves what `sampler` draws."""
        self._sampler = sampler

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> generation_pb2.GenerateResponse:
        """Draws n samples."""
        requests = self._sampler.requests(request.prompt, request.sampling, request.n, text=True, logprobs=request.logprobs)
        chunks = await self._sampler.complete(requests)
        return generation_pb2.GenerateResponse(
            samples=[self._sampler.message(i, chunk) for i, chunk in enumerate(chunks)],
            prompt_token_ids=requests[0].prompt_token_ids,
        )

    async def StreamGenerate(
        self, request: generation_pb2.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        """Draws n samples, token by token."""
        requests = self._sampler.requests(request.prompt, request.sampling, request.n, text=True, logprobs=request.logprobs)
        async for index, chunk in self._sampler.stream(requests):
            yield generation_pb2.StreamGenerateResponse(delta=self._sampler.message(index, chunk))

    async def GetPolicy(self, request: generation_pb2.GetPolicyRequest, context: Any) -> generation_pb2.GetPolicyResponse:
        """Tells which version serves, and how busy the engine is."""
        sampler, engine = self._sampler, self._sampler.engine
        version = common_pb2.PolicyVersion(run=sampler.run, fence=engine.version.fence, step=engine.version.step)
        return generation_pb2.GetPolicyResponse(
            version=version,
            max_model_tokens=engine.limits.max_model_len,
            vocab_size=engine.limits.vocab_size,
            engine=engine.description,
            in_flight=engine.in_flight,
            samples_finished=sampler.finished,
            samples_failed=sampler.failed,
            tokens_sampled=sampler.tokens,
            busy_seconds=sampler.busy.seconds,
        )
