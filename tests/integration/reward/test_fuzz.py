"""Random requests to the real reward service: nothing that a caller sends is a fault of ours."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.fuzz import FAULTS, fuzz
from tests.support.listening import open_channel, serving
from tests.unit.reward.support import TOKENIZER, FakeScorer, make_version

from honed.artifacts.promotions import PromotionRecord
from honed.kit.server import Servicer
from honed.reward.batching import BatchSettings, DynamicBatcher
from honed.reward.follower import RecordFollower
from honed.reward.promoter import Promoter
from honed.reward.registry import ScorerRegistry
from honed.reward.replicas import NoReplicas
from honed.reward.service import RewardService
from honed.reward.settings import ScorerSettings
from honed.reward.sources import ModelSources
from honed.v1 import reward_pb2, reward_pb2_grpc


async def test_nothing_random_is_answered_as_a_fault(tmp_path: Path) -> None:
    def length(settings: ScorerSettings, source: str) -> FakeScorer:
        return FakeScorer(settings.name, "v1", lambda text: float(len(text)))

    make_version(tmp_path / "v1", "v1")
    item = reward_pb2.ScoreItem(id="a", text="fine", prompt={"text": "A film"})
    examples = [reward_pb2.ScoreRequest(items=[item]), reward_pb2.StreamScoreRequest(item=item)]
    settings = [ScorerSettings(name="rm", kind="reward_model", source=str(tmp_path / "v1"))]
    registry = ScorerRegistry(settings)
    store = str(tmp_path / "store")
    sources = ModelSources(store, "r", tmp_path / "copies", [tmp_path])
    follower = RecordFollower(registry, sources, PromotionRecord(store, "r"), NoReplicas())
    await follower.start(length)
    descriptor = reward_pb2.DESCRIPTOR.services_by_name["RewardService"]
    batcher = DynamicBatcher(lambda: registry.serving, BatchSettings(max_tokens=64, max_wait_s=0.0, max_queued=32))
    service = RewardService(batcher, registry, Promoter(follower), lambda: TOKENIZER)
    servicer = Servicer(descriptor.full_name, reward_pb2_grpc.add_RewardServiceServicer_to_server, service)
    async with batcher.running(), serving([servicer]) as server, open_channel(server) as channel:
        found = await fuzz(channel, descriptor, random.Random(5), rounds=40, examples=examples)
    assert not [sent for sent in found if sent.code in FAULTS]
    # An item that breaks a rule of the contract ends the stream with the rule's name.
    for method in ("Score", "StreamScore"):
        assert {s.code for s in found if s.method.endswith(f".{method}")} >= {"OK", "INVALID_ARGUMENT"}
