"""Random requests to the real generation service: nothing that a caller sends is a fault of ours."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tests.support.fuzz import FAULTS, broken, fuzz

from honed.kit.channel import connect
from honed.kit.tokens import read_token
from honed.v1 import generation_pb2

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_nothing_random_is_answered_as_a_fault(service: Any) -> None:
    token = read_token(service.tokens / "operator.token")
    services = generation_pb2.DESCRIPTOR.services_by_name
    async with connect(service.public_address, token) as channel:
        found = await fuzz(channel, services["GenerationService"], random.Random(3), rounds=15)
    async with connect(service.control_address, token) as channel:
        control = services["GenerationControlService"]
        # Not its brakes: what is paused or drained stays so for the tests that follow.
        found += await fuzz(channel, control, random.Random(4), 10, ["PrepareVersion", "CommitVersion", "AbortVersion"])
        assert set((await broken(channel, control)).values()) == {"INVALID_ARGUMENT"}
    assert not [sent for sent in found if sent.code in FAULTS]
