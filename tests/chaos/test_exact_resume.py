"""kill -9 of the learner and a new start equal a run that was never killed, to the last bit (P6)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.integration.jobs.conftest import Services, services
from tests.integration.learner.harness import Learner, a_generator, recorded
from tests.integration.queue.servers import Server

from honed.learner.loop.journal import read_updates
from honed.queue.connection import RedisLink
from honed.queue.keys import SCORED, RunKeys
from honed.queue.messages import Message
from honed.queue.stream import WorkQueue
from honed.v1 import common_pb2

__all__ = ["services"]
pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]

STEPS, BATCH = 8, 8
STALE = 3


def in_pairs(messages: list[Message]) -> list[Message]:
    """Two responses to each prompt, which come some places apart, in another batch's places too."""
    places = random.Random(3)
    paired = []
    for number, message in enumerate(messages):
        scored = common_pb2.ScoredRollout.FromString(message.body)
        scored.rollout.group_id = f"small-{number // 2}"
        paired.append((number + places.uniform(0, 5), Message(message.id, scored.SerializeToString())))
    return [message for _, message in sorted(paired, key=lambda entry: entry[0])]


async def stream(link: RedisLink, run: str, algorithm: str) -> WorkQueue:
    """The same work for both: the batches in order, one entry that nobody can read, and a late-comer's stale rollouts."""
    queue = WorkQueue(link, RunKeys(run), SCORED, "recorder")
    messages = list(recorded(STEPS * BATCH, BATCH))
    if algorithm == "grpo":
        messages = in_pairs(messages)
    stale = [Message(f"late-{m.id}", m.body.replace(b"small-", b"later-")) for m in messages[:STALE]]
    at = BATCH * 5
    await queue.put([*messages[:at], Message("junk", b"\xff\xff"), *stale, *messages[at:]])
    return queue


def bits(directory: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize(("every", "algorithm"), [(1, "ppo"), (4, "ppo"), (4, "grpo")])
async def test_a_learner_killed_again_and_again_ends_with_the_same_bits(
    link: RedisLink, redis_server: Server, tmp_path: Path, every: int, algorithm: str
) -> None:
    """With `every` 4 it is killed between checkpoints: updates are made again from what is not yet acknowledged.

    GRPO needs whole groups: what is made again has the groups that it had, though more is in hand by then.
    """
    async with a_generator() as (_, address):
        names = [f"steady-{algorithm}-{every}", f"killed-{algorithm}-{every}"]
        learner: dict[str, Any] = {"batch": BATCH, "steps": STEPS, "checkpoint_every": every, "algorithm": algorithm}
        samples = 2 if algorithm == "grpo" else 1
        steady, killed = (
            Learner(tmp_path / name, name, redis_server.url, [address], samples=samples, **learner) for name in names
        )
        queues = [await stream(link, name, algorithm) for name in names]

        async def undisturbed() -> Path:
            async with steady.process() as process:
                return await steady.checkpointed(STEPS, process)

        async def disturbed() -> Path:
            for step in (2, 6):  # wherever the learner is just then: in an update, a checkpoint, an export, a push
                async with killed.process() as process:
                    await killed.updated(step, process)
                    process.kill()
                    await process.wait()
            async with killed.process() as process:
                return await killed.checkpointed(STEPS, process)

        ends = await asyncio.gather(undisturbed(), disturbed())
    assert bits(ends[0]).keys() >= {"model.safetensors", "optimizer.safetensors", "generator.safetensors"}
    assert bits(ends[0]) == bits(ends[1])
    updates = [read_updates(learner.place.learner) for learner in (steady, killed)]
    assert [update.rollout_ids for update in updates[0]] == [update.rollout_ids for update in updates[1]]
    assert [update.step for update in updates[1]] == list(range(1, STEPS + 1))
    for queue in queues:
        stats = await queue.stats()
        assert (stats.dead, stats.dropped, stats.balance) == (1, {"stale": STALE}, 0)


async def test_a_learner_of_judgements_killed_again_and_again_ends_with_the_same_bits(
    redis_server: Server, tmp_path: Path, services: Services
) -> None:
    """Each pass over the judgements has a snapshot of its own; more are made while the learners train."""
    preference = services.preference
    for number in range(20):
        preference.compare(f"good {number}", f"bad {number * 7}", prompt=f"film {number % 3}")
    async with a_generator() as (_, address):
        names = ["steady-dpo", "killed-dpo"]
        section: dict[str, Any] = {"batch": BATCH, "steps": STEPS, "checkpoint_every": 3, "algorithm": "dpo"}
        steady, killed = (Learner(tmp_path / name, name, redis_server.url, [address], **section) for name in names)
        for learner in (steady, killed):
            learner.tree["preference"] = {"port": services.port}
            learner.write()

        async def undisturbed() -> Path:
            async with steady.process() as process:
                return await steady.checkpointed(STEPS, process)

        async def disturbed() -> Path:
            for step in (1, 4, 5):
                async with killed.process() as process:
                    await killed.updated(step, process)
                    process.kill()
                    await process.wait()
            async with killed.process() as process:
                return await killed.checkpointed(STEPS, process)

        ends = await asyncio.gather(undisturbed(), disturbed())
    assert bits(ends[0]).keys() >= {"model.safetensors", "optimizer.safetensors", "generator.safetensors"}
    assert bits(ends[0]) == bits(ends[1])
    updates = [read_updates(learner.place.learner) for learner in (steady, killed)]
    assert [update.rollout_ids for update in updates[0]] == [update.rollout_ids for update in updates[1]]
    passes = [update.rollout_ids for update in updates[0]]
    assert len({pair for update in passes[:2] for pair in update}) == 2 * BATCH, "no pair comes twice in a pass"
    assert steady.store.manifest(steady.store.versions()[-1]).lineage.preference_snapshot
