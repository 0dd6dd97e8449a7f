"""kill -9 of the learner and a new start equal a run that was never killed, to the last bit (P6)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
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


async def undisturbed(learner: Learner) -> Path:
    """The last checkpoint of a learner that nobody kills."""
    async with learner.process() as process:
        return await learner.checkpointed(STEPS, process)


async def disturbed(learner: Learner, steps: Sequence[int]) -> Path:
    """That of one that is killed after these updates, wherever it is then: in an update, a checkpoint, an export, a push."""
    for step in steps:
        async with learner.process() as process:
            await learner.updated(step, process)
            process.kill()
            await process.wait()
    return await undisturbed(learner)


def the_same(steady: Learner, killed: Learner, ends: Sequence[Path]) -> None:
    """Both end with the same bits, after the same updates, each once."""
    assert bits(ends[0]).keys() >= {"model.safetensors", "optimizer.safetensors", "generator.safetensors"}
    assert bits(ends[0]) == bits(ends[1])
    updates = [read_updates(learner.place.learner) for learner in (steady, killed)]
    assert [update.rollout_ids for update in updates[0]] == [update.rollout_ids for update in updates[1]]
    assert [update.step for update in updates[1]] == list(range(1, STEPS + 1))


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

        ends = await asyncio.gather(undisturbed(steady), disturbed(killed, (2, 6)))
    the_same(steady, killed, ends)
    for queue in queues:
        stats = await queue.stats()
        assert (stats.dead, stats.dropped, stats.balance) == (1, {"stale": STALE}, 0)


@pytest.mark.parametrize(("algorithm", "kills"), [("dpo", (1, 4, 5)), ("kto", (4,))])
async def test_a_learner_of_judgements_killed_again_and_again_ends_with_the_same_bits(
    redis_server: Server, tmp_path: Path, services: Services, algorithm: str, kills: Sequence[int]
) -> None:
    """Each pass over the judgements has a snapshot of its own; more are made while the learners train."""
    preference = services.preference
    for number in range(20 if algorithm == "dpo" else 10):  # a comparison is one pair, or two single responses
        preference.compare(f"good {number}", f"bad {number * 7}", prompt=f"film {number % 3}")
    async with a_generator() as (_, address):
        names = [f"steady-{algorithm}", f"killed-{algorithm}"]
        section: dict[str, Any] = {"batch": BATCH, "steps": STEPS, "checkpoint_every": 3, "algorithm": algorithm}
        steady, killed = (Learner(tmp_path / name, name, redis_server.url, [address], **section) for name in names)
        for learner in (steady, killed):
            learner.tree["preference"] = {"port": services.port}
            learner.write()
        ends = await asyncio.gather(undisturbed(steady), disturbed(killed, kills))
    the_same(steady, killed, ends)
    passes = [update.rollout_ids for update in read_updates(steady.place.learner)]
    assert len({example for update in passes[:2] for example in update}) == 2 * BATCH, "none comes twice in a pass"
    assert steady.store.manifest(steady.store.versions()[-1]).lineage.preference_snapshot
