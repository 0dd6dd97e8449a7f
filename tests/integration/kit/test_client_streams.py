"""Claims about calls whose requests are a stream: gRPC repeats none of them, for it may lose the end of the stream then."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool

from honed.kit.channel import connect
from honed.kit.channel_options import CLIENT_STREAMING
from honed.v1 import conductor_pb2, generation_pb2, learner_pb2, preference_pb2, preference_pb2_grpc, reward_pb2

FILES = [module.DESCRIPTOR for module in (conductor_pb2, generation_pb2, learner_pb2, preference_pb2, reward_pb2)]


def test_each_method_with_a_stream_of_requests_is_named() -> None:
    found = {
        (service.full_name, method.name)
        for file in FILES
        for service in descriptor_pool.Default().FindFileByName(file.name).services_by_name.values()
        for method in service.methods
        if method.client_streaming
    }
    assert found == set(CLIENT_STREAMING)


class Gone(preference_pb2_grpc.PreferenceServiceServicer):
    """Is killed at each call's first request."""

    def __init__(self) -> None:
        self.calls = 0

    async def ImportJudgements(self, requests: Any, context: Any) -> preference_pb2.ImportJudgementsResponse:
        self.calls += 1
        async for _ in requests:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "killed in the middle")
        return preference_pb2.ImportJudgementsResponse()

    async def GetStats(self, request: Any, context: Any) -> preference_pb2.GetStatsResponse:
        self.calls += 1
        if self.calls == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "killed in the middle")
        return preference_pb2.GetStatsResponse()


async def test_a_call_with_a_stream_is_not_repeated_and_one_without_is() -> None:
    service, server = Gone(), grpc.aio.server()
    preference_pb2_grpc.add_PreferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def requests() -> AsyncIterator[preference_pb2.ImportJudgementsRequest]:
        yield preference_pb2.ImportJudgementsRequest(idempotency_key="0")

    try:
        async with connect(f"127.0.0.1:{port}") as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await stub.ImportJudgements(requests(), timeout=30)
            assert (failed.value.code(), service.calls) == (grpc.StatusCode.UNAVAILABLE, 1)
            service.calls = 0
            await stub.GetStats(preference_pb2.GetStatsRequest(), timeout=30)
            assert service.calls == 2
    finally:
        await server.stop(None)
