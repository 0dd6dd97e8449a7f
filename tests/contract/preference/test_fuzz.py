"""Random requests to the real service: nothing that a caller sends is a fault of ours, and what was acknowledged is there."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.support.fuzz import FAULTS, fuzz
from tests.support.judgements import full
from tests.support.listening import open_channel, serving

from honed.kit.server import Servicer
from honed.preference.service import PreferenceService
from honed.preference.store import PreferenceStore
from honed.v1 import preference_pb2 as pb
from honed.v1 import preference_pb2_grpc


async def test_nothing_random_is_answered_as_a_fault(url: str, make_store: Callable[..., PreferenceStore]) -> None:
    examples = [
        pb.RecordJudgementRequest(judgement=full("ranking"), idempotency_key="r"),
        pb.ImportJudgementsRequest(judgement=full(), idempotency_key="i"),
    ]
    descriptor = pb.DESCRIPTOR.services_by_name["PreferenceService"]
    async with make_store(url) as store:
        add = preference_pb2_grpc.add_PreferenceServiceServicer_to_server
        servicer = Servicer(descriptor.full_name, add, PreferenceService(store))
        async with serving([servicer]) as server, open_channel(server) as channel:
            found = await fuzz(channel, descriptor, random.Random(11), rounds=40, examples=examples)
            stats = await preference_pb2_grpc.PreferenceServiceStub(channel).GetStats(pb.GetStatsRequest(), timeout=5)
    assert not [sent for sent in found if sent.code in FAULTS]
    codes = {sent.code for sent in found if sent.method.endswith("RecordJudgement")}
    assert codes >= {"OK", "INVALID_ARGUMENT", "ALREADY_EXISTS"}
    assert stats.judgements == sum(stats.by_kind.values())
