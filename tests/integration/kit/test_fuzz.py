"""Whatever bytes arrive at any call of the contract, its caller gets a code that says whose mistake it was."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from tests.support.calls import failure
from tests.support.fuzz import FAULTS, broken, fuzz
from tests.support.listening import local_table, open_channel, serving

from honed.kit.server import Servicer
from honed.v1 import (
    conductor_pb2,
    conductor_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    learner_pb2,
    learner_pb2_grpc,
    preference_pb2,
    preference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
)

MODULES = (
    (generation_pb2, generation_pb2_grpc),
    (reward_pb2, reward_pb2_grpc),
    (preference_pb2, preference_pb2_grpc),
    (learner_pb2, learner_pb2_grpc),
    (conductor_pb2, conductor_pb2_grpc),
)
SERVICES = [
    pytest.param(service, getattr(stubs, f"add_{service.name}Servicer_to_server"), id=service.name)
    for messages, stubs in MODULES
    for service in messages.DESCRIPTOR.services_by_name.values()
]


class Answers:
    """A servicer of any service: reads what comes, and answers with empty messages. A stream is read inside a task group."""

    def __init__(self, service: ServiceDescriptor) -> None:
        for method in service.methods:
            setattr(self, method.name, self._handler(method))

    def _handler(self, method: MethodDescriptor) -> Any:
        response = message_factory.GetMessageClass(method.output_type)

        async def unary(request: Any, context: Any) -> Any:
            if method.client_streaming:
                await self._read(request)
            return response()

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            if method.client_streaming:
                await self._read(request)
            yield response()

        return stream if method.server_streaming else unary

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        async def drain() -> None:
            async for _ in requests:
                pass

        async with asyncio.TaskGroup() as group:
            group.create_task(drain())


@pytest.mark.parametrize(("service", "add"), SERVICES)
async def test_bytes_that_are_no_message_are_the_callers_mistake(service: ServiceDescriptor, add: Any, tmp_path: Path) -> None:
    servicer = Servicer(service.full_name, add, Answers(service))
    async with serving([servicer], tokens=local_table(tmp_path)) as server:
        async with open_channel(server, tmp_path) as channel:
            assert set((await broken(channel, service)).values()) == {"INVALID_ARGUMENT"}
        async with open_channel(server) as stranger:  # who may not call is not told what a message looks like
            assert set((await broken(stranger, service)).values()) == {"UNAUTHENTICATED"}


@pytest.mark.parametrize(("service", "add"), SERVICES)
async def test_nothing_random_is_answered_as_a_fault_of_the_service(service: ServiceDescriptor, add: Any) -> None:
    async with serving([Servicer(service.full_name, add, Answers(service))]) as server, open_channel(server) as channel:
        found = await fuzz(channel, service, random.Random(7), rounds=12)
    assert {sent.code for sent in found} <= {"OK", "INVALID_ARGUMENT"}, [s for s in found if s.code in FAULTS]
    assert any(sent.code == "INVALID_ARGUMENT" for sent in found)


async def test_a_broken_message_inside_a_stream_names_the_mistake() -> None:
    service = reward_pb2.DESCRIPTOR.services_by_name["RewardService"]
    add = reward_pb2_grpc.add_RewardServiceServicer_to_server
    async with serving([Servicer(service.full_name, add, Answers(service))]) as server, open_channel(server) as channel:
        good = reward_pb2.StreamScoreRequest(item=reward_pb2.ScoreItem(id="a", text="b")).SerializeToString()
        call = channel.stream_stream(f"/{service.full_name}/StreamScore")(iter([good, b"\xff\xff"]), timeout=5)
        error, details = await failure(call.read())
    assert error.code().name == "INVALID_ARGUMENT"
    assert "are no message" in details["BadRequest"].field_violations[0].description
