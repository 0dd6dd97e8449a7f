"""The two services that the reward-model job calls, as far as it calls them."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc, preference_pb2, preference_pb2_grpc


class Preference(preference_pb2_grpc.PreferenceServiceServicer):
    """A record of judgements; a snapshot's key gives what was there when the key was used first."""

    def __init__(self) -> None:
        self.judgements: list[preference_pb2.Judgement] = []
        self.snapshots: dict[str, list[preference_pb2.Judgement]] = {}
        self.exported = 0

    def compare(self, better: str, worse: str, prompt: str = "") -> None:
        self.judgements.append(comparison(better, worse, prompt))

    async def GetStats(self, request: preference_pb2.GetStatsRequest, context: Any) -> preference_pb2.GetStatsResponse:
        return preference_pb2.GetStatsResponse(judgements=len(self.judgements), last_id=len(self.judgements))

    async def CreateSnapshot(self, request: preference_pb2.CreateSnapshotRequest, context: Any) -> Any:
        frozen = self.snapshots.setdefault(request.idempotency_key, list(self.judgements))
        digest = hashlib.sha256(b"".join(j.SerializeToString(deterministic=True) for j in frozen)).hexdigest()
        return preference_pb2.CreateSnapshotResponse(snapshot_id=request.idempotency_key, content_sha256=digest)

    async def ExportJudgements(self, request: preference_pb2.ExportJudgementsRequest, context: Any) -> AsyncIterator[Any]:
        self.exported += 1
        for judgement in self.snapshots[request.snapshot_id]:
            yield preference_pb2.ExportJudgementsResponse(judgement=judgement)


class Generation(generation_pb2_grpc.GenerationServiceServicer):
    """Samples the seed's digits; `loading` calls fail before it serves."""

    def __init__(self) -> None:
        self.version = common_pb2.PolicyVersion(run="small", fence=0, step=0)
        self.loading = 0
        self.asked: list[generation_pb2.GenerateRequest] = []

    async def GetPolicy(self, request: generation_pb2.GetPolicyRequest, context: Any) -> generation_pb2.GetPolicyResponse:
        return generation_pb2.GetPolicyResponse(version=self.version)

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> generation_pb2.GenerateResponse:
        if self.loading:
            self.loading -= 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "loading")
        self.asked.append(request)
        seed, length = request.sampling.seed, request.sampling.max_tokens
        tokens = [2 + (seed * 31 + 7 * position) % 250 for position in range(length)]
        span = common_pb2.VersionSpan(version=self.version, start=0, end=length)
        sample = generation_pb2.Sample(index=0, token_ids=tokens, version_spans=[span])
        return generation_pb2.GenerateResponse(samples=[sample], prompt_token_ids=request.prompt.token_ids.ids)


class Services:
    """Both, on one port."""

    def __init__(self) -> None:
        self.preference, self.generation = Preference(), Generation()
        self.port = 0

    async def serve(self) -> AsyncIterator[Services]:
        server = grpc.aio.server()
        preference_pb2_grpc.add_PreferenceServiceServicer_to_server(self.preference, server)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self.generation, server)
        self.port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        yield self
        await server.stop(None)


def comparison(better: str, worse: str, prompt: str = "") -> preference_pb2.Judgement:
    """Two responses, the better one second."""
    return preference_pb2.Judgement(
        prompt=prompt,
        responses=[preference_pb2.JudgedResponse(text=worse), preference_pb2.JudgedResponse(text=better)],
        pairwise=preference_pb2.PairwiseJudgement(preferred=1, other=0),
        source="test",
        annotator="somebody",
    )


@pytest.fixture
async def services() -> AsyncIterator[Services]:
    async for services in Services().serve():
        yield services
