"""One run that loses each of its services in turn, by kill -9, and Redis for twenty seconds. It finishes all the same."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from tests.support.run import check_books, kill, process, run_tree, settings_of, step_of, until

from honed.conductor.local import local_run
from honed.conductor.run import Run
from honed.learner.loop.journal import read_pushes, read_updates
from honed.learner.loop.records import UpdateRecord
from honed.v1 import conductor_pb2

pytestmark = [pytest.mark.redis, pytest.mark.timeout(480), pytest.mark.asyncio(loop_scope="module")]

STEPS, BATCH, STALENESS = 60, 8, 2
VICTIMS = ("redis", "generation-0", "reward-0", "learner", "preference")
OUTAGE_S = 20.0


@dataclass
class Survivor:
    """The run after all that."""

    run: Run
    steps: list[UpdateRecord]
    steps_during_outage: int


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def survivor(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Survivor]:
    root = tmp_path_factory.mktemp("chaos")
    tree = run_tree(
        root,
        learner={"batch": BATCH, "steps": STEPS, "max_staleness": STALENESS},
        conductor={"response_tokens": 48},
    )
    async with local_run(settings_of(tree)) as run, asyncio.timeout(420):
        executing = asyncio.ensure_future(run.execute())

        async def two_more_steps() -> None:
            goal = step_of(run.workspace.root) + 2
            await until(lambda: step_of(run.workspace.root) >= goal or executing.done(), 180, f"step {goal}")
            assert not executing.done(), executing.exception() or "it finished before everything was killed"

        for victim in VICTIMS:
            await two_more_steps()
            await kill(run.fleet, victim)
        await two_more_steps()
        before = step_of(run.workspace.root)
        await stopped(process(run.fleet, "redis").pid, OUTAGE_S)
        during = step_of(run.workspace.root) - before
        await executing
        yield Survivor(run, read_updates(run.workspace.learner), during)


async def stopped(pid: int | None, seconds: float) -> None:
    """Redis answers nobody for so long; connections to it hang."""
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            await asyncio.sleep(0.1)
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_the_run_finishes_and_each_restart_is_counted(survivor: Survivor) -> None:
    assert survivor.run.state.phase == conductor_pb2.RUN_PHASE_FINISHED
    states = {state.name: state for state in survivor.run.fleet.states() if state.name in VICTIMS}
    assert {name: (state.restarts, state.last_exit) for name, state in states.items()} == dict.fromkeys(
        VICTIMS, (1, "killed by SIGKILL")
    )


async def test_each_step_was_made_once_and_no_rollout_trained_twice(survivor: Survivor) -> None:
    assert [step.step for step in survivor.steps] == list(range(1, STEPS + 1))
    assert {len(step.rollout_ids) for step in survivor.steps} == {BATCH}
    ids = [rollout for step in survivor.steps for rollout in step.rollout_ids]
    assert len(ids) == len(set(ids)) == STEPS * BATCH


async def test_no_rollout_was_lost_without_a_stated_reason(survivor: Survivor) -> None:
    reasons = check_books(survivor.run.state.stages, survivor.steps)
    assert set(reasons) <= {"stale", "run_finished", "consumed"}
    assert survivor.run.state.stages["prompts"].came_in == survivor.run.state.admitted


async def test_nothing_staler_than_the_bound_trained(survivor: Survivor) -> None:
    assert max(step.values["staleness_max"] for step in survivor.steps) <= STALENESS


async def test_the_generator_serves_the_last_version(survivor: Survivor) -> None:
    succeeded = [push for push in read_pushes(survivor.run.workspace.learner) if push.committed and not push.failures]
    fence, step = map(int, succeeded[-1].version.split("."))
    assert (fence, step) == (2, STEPS), "the second learner of the run has the second fence"


async def test_twenty_seconds_without_redis_are_ridden_out(survivor: Survivor) -> None:
    """No service died of it: `test_the_run_finishes` counted the restarts. At most what was under way came to its end."""
    assert survivor.steps_during_outage <= 2
