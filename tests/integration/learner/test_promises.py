"""Each rollout trains once (P2): the real loop and trainer on a real redis-server that is killed, cut back and emptied."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.integration.queue.servers import Server
from tests.support.learner_world import Learner, World, make_world
from tests.support.run import until
from tests.unit.learner.samples import VOCABULARY, random_episodes

from honed.learner.data.episode import Vocabulary
from honed.learner.loop.checkpoint import CheckpointStore
from honed.learner.loop.checkpoint_files import Checkpoint, Progress
from honed.learner.loop.journal import read_updates
from honed.learner.sources.scored_stream import Intake, IntakeSettings
from honed.learner.sources.trained import TrainedIds
from honed.learner.status import NoPromotions, Reporter
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.holding import holding
from honed.queue.keys import SCORED, RunKeys
from honed.queue.messages import Message
from honed.queue.progress import ProgressBoard
from honed.queue.stream import DeliverySettings, WorkQueue
from honed.v1 import common_pb2

pytestmark = pytest.mark.redis

KEYS = RunKeys("r")
BATCH = 4


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own: it will be killed."""
    with Server(tmp_path / "redis", "--appendfsync", "always") as server:
        yield server


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "world")


def scored(*turns: int) -> list[Message]:
    """Scored rollouts of these turns, sampled by the base."""
    episodes = random_episodes(max(turns) + 1, seed=1)
    messages = []
    for turn in turns:
        episode = episodes[turn]
        version = common_pb2.PolicyVersion(run="r", fence=0, step=0)
        rollout = common_pb2.Rollout(
            rollout_id=f"r-{turn}/0",
            run="r",
            prompt_token_ids=episode.prompt,
            response_token_ids=episode.response,
            logprobs=episode.logprobs,
            version_spans=[common_pb2.VersionSpan(version=version, start=0, end=len(episode.response))],
            sampling=common_pb2.SamplingParams(temperature=1.0),
        )
        body = common_pb2.ScoredRollout(rollout=rollout, reward=episode.reward).SerializeToString()
        messages.append(Message(f"r-{turn}/0", body))
    return messages


def queue(link: RedisLink, consumer: str) -> WorkQueue:
    return WorkQueue(link, KEYS, SCORED, consumer, DeliverySettings(lease_ms=1000, sweep_ms=20))


@asynccontextmanager
async def learning(world: World, link: RedisLink, fence: int = 1) -> AsyncIterator[Learner]:
    """A learner on the real queue, resumed."""
    own = queue(link, f"learner-{fence}")
    async with holding(own) as held:
        world.intake = Intake(own, held, Vocabulary(VOCABULARY), IntakeSettings(max_staleness=10**6), TrainedIds("r"))  # type: ignore[assignment]
        learner = world.learner(fence=fence)

        async def dropped() -> dict[str, int]:
            return dict((await own.stats()).dropped)

        async def identify() -> None:
            pass

        learner.state.reporter = Reporter(
            learner.status, ProgressBoard(link, KEYS), samples=1, dropped=dropped, promotions=NoPromotions(), identify=identify
        )
        await learner.state.take_over([f"learner-{earlier}" for earlier in range(1, fence)])
        try:
            yield learner
        finally:
            await world.intake.close()  # type: ignore[attr-defined]


@asynccontextmanager
async def running(learner: Learner) -> AsyncIterator[None]:
    loop = asyncio.ensure_future(learner.loop.run())
    try:
        async with asyncio.timeout(60):
            yield
    finally:
        learner.stopping.set()
        await asyncio.wait_for(loop, 60)


def trained(world: World) -> list[str]:
    ids = [rollout for update in read_updates(world.home) for rollout in update.rollout_ids]
    assert [rollout for rollout, times in Counter(ids).items() if times > 1] == [], "trained twice"
    return ids


async def test_a_redis_that_lost_its_last_second_makes_no_rollout_train_twice(
    world: World, redis: Server, tmp_path: Path
) -> None:
    """H1, L3: acknowledgements are lost, and the same rollouts come again under their old entries and under new ones."""
    world.steps = 3
    before = tmp_path / "before"
    async with RedisLink(redis.url, retry=RetryPolicy(math.inf)) as link, learning(world, link) as learner:
        await queue(link, "reward").put(scored(*range(8)))
        shutil.copytree(tmp_path / "redis", before)  # what the disk had a second ago
        async with running(learner):
            await until(lambda: learner.status.checkpoint_update == 2, 60, "the second checkpoint", every_s=0.005)
            await asyncio.to_thread(redis.kill)
            shutil.rmtree(tmp_path / "redis")
            shutil.copytree(before, tmp_path / "redis")
            await asyncio.to_thread(redis.start)
            await queue(link, "reward").put(scored(2, 3, 8, 9, 10, 11))  # sampled again: their hand-on was lost too
            await until(lambda: learner.status.finished, 60, "the learner is done", every_s=0.005)
            stats = await queue(link, "test").stats()
    assert trained(world) == [f"r-{turn}/0" for turn in range(12)]
    assert stats.dropped == {"duplicate": 10}
    assert (stats.acked, stats.depth, stats.balance) == (4, 0, 0), "Redis has forgotten the first eight"


async def test_a_redis_that_was_emptied_costs_what_was_in_it_and_nothing_else(world: World, redis: Server) -> None:
    world.steps = 3
    async with RedisLink(redis.url, retry=RetryPolicy(math.inf)) as link, learning(world, link) as learner:
        await queue(link, "reward").put(scored(*range(6)))
        async with running(learner):
            await until(
                lambda: learner.status.checkpoint_update == 1 and learner.state.intake.waiting == 2,
                30,
                "a checkpoint, and two that wait",
                every_s=0.005,
            )
            await link.redis.flushall()
            await learner.state.reporter.write()
            board = await ProgressBoard(link, KEYS).read()
            assert board is not None
            assert (board.update, board.turn) == (1, 4), "those who feed go on from here"
            await queue(link, "reward").put(scored(*range(12)))  # at worst, all turns from the first
            await until(lambda: learner.status.finished, 60, "the learner is done", every_s=0.005)
            assert (await queue(link, "test").stats()).dropped == {"duplicate": 6}
    assert trained(world) == [f"r-{turn}/0" for turn in range(12)]


async def test_a_learner_killed_between_checkpoint_and_acknowledgement_trains_nothing_again_in_a_long_run(
    world: World, redis: Server
) -> None:
    """C1: with far more rollouts behind it than an ordered memory of ids would hold."""
    world.steps, first = 1001, 250_000
    async with RedisLink(redis.url, retry=RetryPolicy(math.inf)) as link:
        messages = scored(*range(2 * BATCH))
        turns = [message.id for message in messages]
        await queue(link, "reward").put(messages)
        held = await queue(link, "learner-1").take(2 * BATCH)
        assert [delivery.message.id for delivery in held] == turns
        # What its checkpoint knows: everything before, and the first of the two batches that it held.
        known = TrainedIds.all_before("r", first)
        known.discard(turns[BATCH:])
        trainer = world.learner(load=False).state.training
        trainer.trainer.step = 1000
        CheckpointStore(world.home / "checkpoints").save(Checkpoint(trainer.state(), Progress(known, "1.1000")), 1)
        async with learning(world, link, fence=2) as learner:
            stats = await queue(link, "test").stats()
            assert (stats.acked, stats.dropped, learner.state.intake.waiting) == (BATCH, {}, BATCH)
            async with running(learner):
                await until(lambda: learner.status.finished, 60, "the learner is done", every_s=0.005)
            stats = await queue(link, "test").stats()
            assert (stats.acked, stats.dropped, stats.depth) == (2 * BATCH, {}, 0)
    assert trained(world) == turns[BATCH:]


async def test_a_run_whose_newest_checkpoint_is_damaged_finishes_and_every_rollout_is_accounted_for(
    world: World, redis: Server
) -> None:
    """H4, through the real queue."""
    world.steps = 3
    async with RedisLink(redis.url, retry=RetryPolicy(math.inf)) as link:
        await queue(link, "reward").put(scored(*range(12)))
        async with learning(world, link) as first, running(first):
            await until(lambda: first.status.finished, 60, "the first learner is done", every_s=0.005)
        newest = CheckpointStore(world.home / "checkpoints").list()[-1]
        os.truncate(newest / "optimizer.safetensors", 10)
        async with learning(world, link, fence=2) as second:
            assert second.journal.totals.undone == 4
            await queue(link, "reward").put(scored(12, 13, 14, 15))  # the feeder goes by the learner's own update
            async with running(second):
                await until(lambda: second.status.finished, 60, "the second learner is done", every_s=0.005)
            totals, stats = second.journal.totals, await queue(link, "test").stats()
    assert trained(world) == [f"r-{turn}/0" for turn in (*range(8), *range(12, 16))]
    assert stats.came_in == 16 == totals.trained + totals.undone + sum(stats.dropped.values())


async def test_a_learner_killed_between_checkpoints_makes_its_updates_again_and_counts_nothing_as_undone(
    world: World, redis: Server
) -> None:
    """H3: the report says how many entries of the stream have trained already."""
    world.steps, world.checkpoint_every = 3, 4
    async with RedisLink(redis.url, retry=RetryPolicy(math.inf)) as link:
        await queue(link, "reward").put(scored(*range(10)))
        async with learning(world, link) as first:
            loop = asyncio.ensure_future(first.loop.run())
            await until(lambda: first.status.update == 2, 60, "the second update", every_s=0.005)
            board = await ProgressBoard(link, KEYS).read()
            assert board is not None
            assert (board.unsaved, (await queue(link, "test").stats()).depth) == (8, 10)
            loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await loop
        async with learning(world, link, fence=2) as second:
            assert (second.status.update, second.journal.totals.undone) == (0, 0)
            await queue(link, "reward").put(scored(10, 11))
            async with running(second):
                await until(lambda: second.status.finished, 60, "the second learner is done", every_s=0.005)
    assert trained(world) == [f"r-{turn}/0" for turn in range(12)]
