"""The reward process: scorers, dynamic batching, the gRPC service, and the scoring worker."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

import torch

from honed.artifacts.store import PolicyStore
from honed.config import RewardSettings, RunSettings, ScorerSettings
from honed.kit.server import Listener, Server, Servicer, serve_until_signalled
from honed.kit.wiring import consumer_name, redis_url, server_options
from honed.queue.connection import Link, Outage
from honed.queue.keys import ROLLOUTS, RunKeys
from honed.queue.stream import QueueSettings, WorkQueue
from honed.reward.batching import BatchSettings, DynamicBatcher
from honed.reward.function_scorer import find_function
from honed.reward.model_scorer import ModelScorer
from honed.reward.policy_tokenizer import policy_tokenizer
from honed.reward.registry import BuildScorer, ScorerRegistry
from honed.reward.reward import Truncation
from honed.reward.scorer import Scorer, TokenCodec
from honed.reward.service import RewardService
from honed.reward.worker import ScoringWorker
from honed.v1 import reward_pb2_grpc

logger = logging.getLogger(__name__)

_GROUP: Final = 256  # rollouts that the worker takes at once

SERVICE = "honed.v1.RewardService"


async def run(settings: RunSettings, *, with_worker: bool = True) -> None:
    """Serves until SIGTERM.

    Args:
        settings: The run.
        with_worker: False serves the endpoints alone, without Redis.

    Raises:
        HonedError: A scorer cannot be loaded, the policy's tokenizer is nowhere, Redis is gone for good, or a scorer hangs.
    """
    mine = settings.reward
    url = redis_url(settings) if with_worker else None
    torch.set_num_threads(mine.threads)
    codec = await policy_tokenizer(PolicyStore(settings.policy_url, settings.run), mine.policy_wait_s)
    registry = ScorerRegistry(
        mine.scorers,
        make_builder(mine, codec),
        record=settings.directory / "reward" / "promotions.json",
        roots=[Path(root) for root in mine.allowed_roots] or [settings.directory],
        truncation=make_truncation(mine, codec),
    )
    batcher = DynamicBatcher(
        lambda: registry.serving, BatchSettings(mine.batch_tokens, mine.batch_wait_ms / 1000, mine.max_queued)
    )
    service = RewardService(batcher, registry, codec)
    servicer = Servicer(SERVICE, reward_pb2_grpc.add_RewardServiceServicer_to_server, service)
    server = Server([Listener(mine.host, mine.port, [servicer])], server_options(settings, mine))

    async def work(stopping: asyncio.Event) -> None:
        await registry.start()
        await server.ready()
        logger.info("serving", extra={"scorers": {s.scorer.name: s.scorer.version for s in registry.scorers() if s.serving}})
        if url is None:
            await stopping.wait()
            return
        leases = QueueSettings(int(settings.queue.lease_s * 1000), settings.queue.max_deliveries)
        async with Link(url, outage=Outage(settings.queue.outage_s)) as link:
            queue = WorkQueue(link, RunKeys(settings.run), ROLLOUTS, consumer_name("reward"), leases)
            await ScoringWorker(queue, batcher, codec, min(_GROUP, mine.max_queued)).run(stopping)

    # The batcher outlives the server, so that calls in flight at a SIGTERM are answered.
    async with batcher.running():
        await serve_until_signalled(server, work)


def make_builder(mine: RewardSettings, codec: TokenCodec) -> BuildScorer:
    """How this process makes a scorer from its settings and a source."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def build(scorer: ScorerSettings, source: str) -> Scorer:
        if scorer.kind == "function":
            return find_function(scorer.name, source, sees_prompt=scorer.sees_prompt)
        return ModelScorer(
            scorer.name,
            Path(source),
            codec,
            sees_prompt=scorer.sees_prompt,
            batch_tokens=mine.batch_tokens,
            device=device,
        )

    return build


def make_truncation(mine: RewardSettings, codec: TokenCodec) -> Truncation | None:
    """Where the settings cut the scored text."""
    cut = mine.truncate
    return None if cut is None else Truncation.of_text(cut.token_text, cut.not_before, cut.missing_score, codec)
