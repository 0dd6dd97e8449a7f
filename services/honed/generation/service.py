"""GenerationService: what applications call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from honed.generation.best_of import BestOf
from honed.generation.frontend import SamplingFrontend
from honed.generation.gate import RequestKind
from honed.report.measures import percentile
from honed.v1 import generation_pb2, generation_pb2_grpc


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Samples from the live policy. A caller that leaves frees the engine."""

    def __init__(self, frontend: SamplingFrontend, best_of: BestOf, replica: str = "") -> None:
        """Serves what `frontend` draws and `best_of` chooses; `replica` is the name of this process as a member."""
        self._frontend = frontend
        self._best_of = best_of
        self._replica = replica

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> generation_pb2.GenerateResponse:
        """Draws n samples, or chooses the n best."""
        if request.HasField("best_of"):
            best, prompt = await self._best_of.winners(request)
            return generation_pb2.GenerateResponse(samples=best, prompt_token_ids=prompt)
        requests = await self._frontend.requests(
            request.prompt, request.sampling, request.n, text=True, logprobs=request.logprobs
        )
        chunks = await self._frontend.complete(requests)
        return generation_pb2.GenerateResponse(
            samples=[self._frontend.codec.sample(i, chunk) for i, chunk in enumerate(chunks)],
            prompt_token_ids=requests[0].prompt_token_ids,
        )

    async def StreamGenerate(
        self, request: generation_pb2.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        """Draws n samples, token by token; or sends the n best when all candidates are scored."""
        if request.HasField("best_of"):
            best, _ = await self._best_of.winners(request)
            for sample in best:
                yield generation_pb2.StreamGenerateResponse(delta=sample)
            return
        requests = await self._frontend.requests(
            request.prompt, request.sampling, request.n, text=True, logprobs=request.logprobs
        )
        async for index, chunk in self._frontend.stream(requests):
            yield generation_pb2.StreamGenerateResponse(delta=self._frontend.codec.sample(index, chunk))

    async def GetPolicy(self, request: generation_pb2.GetPolicyRequest, context: Any) -> generation_pb2.GetPolicyResponse:
        """Tells which version serves, and how busy the engine is."""
        frontend, engine = self._frontend, self._frontend.engine
        return generation_pb2.GetPolicyResponse(
            version=frontend.codec.version(engine.version),
            max_model_tokens=engine.limits.max_model_len,
            vocab_size=engine.limits.vocab_size,
            engine=engine.description,
            in_flight=engine.in_flight,
            samples_finished=frontend.finished,
            samples_failed=frontend.failed,
            tokens_sampled=frontend.tokens,
            busy_seconds=frontend.busy.seconds,
            replica=self._replica,
            draining=frontend.draining,
            training_in_flight=frontend.gate.in_flight_of(RequestKind.TRAINING),
            waiting=frontend.gate.in_flight - frontend.gate.running,
            pause_p95_seconds=percentile(frontend.pauses, 0.95) if frontend.pauses else 0.0,
        )
