"""The learner process as a service: registered generators, live streams, a stop, and what a killed predecessor left."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from tests.integration.learner.harness import Learner, a_generator, recorded
from tests.integration.queue.servers import Server
from tests.support.run import until

from honed.learner.data.episode import Vocabulary
from honed.learner.loop.journal import read_pushes, read_updates
from honed.learner.main import LearnerProcess
from honed.learner.sources.scored_stream import Intake, IntakeSettings
from honed.learner.sources.trained import TrainedIds
from honed.learner.status import LearnerStatus
from honed.queue.connection import RedisLink
from honed.queue.embedded import free_port
from honed.queue.holding import holding
from honed.queue.keys import SCORED, RunKeys
from honed.queue.members import GENERATION, Member, Members, registered
from honed.queue.progress import LearnerProgress, ProgressBoard
from honed.queue.stream import WorkQueue
from honed.runtime import internal_channel
from honed.v1 import learner_pb2, learner_pb2_grpc

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]

BATCH = 4
pb: Any = learner_pb2


async def reported(board: ProgressBoard, served: int) -> LearnerProgress | None:
    progress = await board.read()
    return progress if progress is not None and progress.served == served else None


async def test_it_pushes_to_who_is_registered_streams_what_it_does_and_stops_at_once(
    link: RedisLink, redis_server: Server, tmp_path: Path
) -> None:
    """M21: open streams do not hold the stop up. H9: no generator is listed by hand."""
    keys = RunKeys("service")
    async with a_generator() as (generator, address):
        learner = Learner(
            tmp_path, "service", redis_server.url, ["127.0.0.1:1"], batch=BATCH, steps=None, port=free_port(), drain_s=30.0
        )
        home = learner.place.learner
        (home / "export" / "7.7").mkdir(parents=True)
        (home / "checkpoints" / ".partial-000000-00000009-step-9").mkdir(parents=True)
        member = Member("g-0", "", control_address=address)
        async with registered(Members(link, keys, GENERATION), lambda: member), learner.process() as process:
            await WorkQueue(link, keys, SCORED, "recorder").put(list(recorded(2 * BATCH, BATCH)))
            await learner.checkpointed(2, process)
            channel = internal_channel(learner.settings, learner.settings.learner.target)
            stub = learner_pb2_grpc.LearnerServiceStub(channel)
            metrics, pushes = stub.WatchMetrics(pb.WatchMetricsRequest()), stub.WatchPushes(pb.WatchPushesRequest())
            steps = [(await metrics.read()).metrics.step for _ in range(2)]
            labels = [(await pushes.read()).push.version.step for _ in range(2)]
            status = await stub.GetStatus(pb.GetStatusRequest(), timeout=5)
            board = await until(lambda: reported(ProgressBoard(link, keys), 2), 1.0, "a commit is reported at once")
            started = asyncio.get_running_loop().time()
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 25) == 0, learner.log.read_text()[-2000:]
            assert asyncio.get_running_loop().time() - started < 20
            await channel.close()
    assert (steps, labels) == ([1, 2], [1, 2])
    assert generator.serving == ["1.1", "1.2"]
    assert (status.target_steps, status.rollouts_trained, status.versions_pushed) == (0, 2 * BATCH, 2)
    assert (board.fence, board.update, board.served, board.unsaved, board.finished) == (1, 2, 2, 0, False)
    assert not (home / "export").exists() or not list((home / "export").iterdir())
    assert not list((home / "checkpoints").glob(".partial-*"))
    assert [update.step for update in read_updates(home)] == [1, 2]
    assert [push.committed for push in read_pushes(home)] == [1, 1]
    consumers = await link.redis.xinfo_consumers(keys.stream(SCORED), "workers")
    assert [row["name"] for row in consumers if row["name"].startswith(b"learner")] == [], "it has left the queue"


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of the last change of every file."""
    return {str(p.relative_to(directory)): (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.rglob("*") if p.is_file()}


async def test_a_second_process_on_the_same_directory_ends_with_the_name_of_the_first_and_changes_no_file(
    link: RedisLink, redis_server: Server, tmp_path: Path
) -> None:
    """M2. Whether it has the same Redis makes no difference: the directory is locked before anything else."""
    keys = RunKeys("twice")
    async with a_generator() as (_, address):
        learner = Learner(tmp_path, "twice", redis_server.url, [address], batch=BATCH, steps=None)
        home = learner.place.learner
        async with learner.process() as first:
            await WorkQueue(link, keys, SCORED, "recorder").put(list(recorded(BATCH, BATCH)))
            await learner.checkpointed(1, first)
            await until(lambda: len(read_pushes(home)) == 1, 60, "it has done what there is to do", every_s=0.1)
            before = contents(learner.settings.directory)
            learner.log = tmp_path / "second.log"
            async with learner.process() as second:
                assert await asyncio.wait_for(second.wait(), 90) == 1
            assert contents(learner.settings.directory) == before
            assert first.returncode is None
            said = learner.log.read_text()
            assert f"{home} is in use by another learner" in said
            assert f'"pid": {first.pid}' in said.replace("\\", "")
            learner.log = tmp_path / "first.log"
            await WorkQueue(link, keys, SCORED, "recorder").put(list(recorded(2 * BATCH, BATCH))[BATCH:])
            await learner.checkpointed(2, first)


async def test_entries_of_any_number_of_earlier_learners_are_taken_up_in_the_order_of_the_stream(
    link: RedisLink, redis_server: Server, tmp_path: Path
) -> None:
    """L2: an exact replay needs the order, also where a lease was lost and won in between."""
    learners = 70
    learner = Learner(tmp_path, "heirs", redis_server.url, ["127.0.0.1:1"], batch=BATCH)
    keys, messages = RunKeys("heirs"), list(recorded(learners, BATCH))
    await WorkQueue(link, keys, SCORED, "recorder").put(messages)
    fences = list(range(1, learners + 1))
    random.Random(0).shuffle(fences)
    for fence in fences:
        await WorkQueue(link, keys, SCORED, f"learner-{fence}").take(1)
    found = await LearnerProcess(learner.settings, link, LearnerStatus(), asyncio.Event())._predecessors("learner-71")
    assert found == [f"learner-{fence}" for fence in range(1, learners + 1)]
    own = WorkQueue(link, keys, SCORED, "learner-71")
    async with holding(own) as held, asyncio.timeout(60):
        intake = Intake(own, held, Vocabulary(258), IntakeSettings(max_staleness=learners), TrainedIds("small"))
        await intake.take_over(found)
        batch = await intake.collect(learners, 0)
        await intake.close()
    assert [each.rollout_id for each in batch] == [message.id for message in messages]
