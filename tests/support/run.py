"""A small run of the whole product: its run file, its processes, and the books that it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml
from tests.support.tiny import make_tiny_model

from honed.conductor.launcher import ProcessState
from honed.config import RunSettings
from honed.learner.loop.journal import read_updates
from honed.learner.loop.records import UpdateRecord
from honed.queue.connection import RedisLink
from honed.queue.keys import ROLLOUTS, SCORED, STAGES, RunKeys
from honed.queue.stats import StageStats
from honed.queue.stream import WorkQueue
from honed.v1 import common_pb2
from honed.workspace import Workspace

SERVICES = Path(__file__).parents[2] / "services"
FIRST_TOKEN = 2  # of the tiny tokenizer, after its two special ones


def write_prompts(path: Path, count: int = 12, length: int = 6) -> Path:
    """JSON lines with `token_ids` of the tiny tokenizer."""
    chance = random.Random(count)
    rows = ({"token_ids": [chance.randrange(FIRST_TOKEN, 258) for _ in range(length)]} for _ in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_tree(root: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """The run file of a small loop under `root`, with what a test changes merged into its sections."""
    model = root / "model"
    if not model.exists():
        make_tiny_model(model, seed=1)
    prompts = root / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(prompts)
    tree: dict[str, Any] = {
        "run": "small",
        "directory": str(root / "run"),
        "seed": 7,
        "queue": {"lease_s": 3.0},
        "policy": {"keep": 1000},
        "generation": {
            "engine": "transformers", "max_model_tokens": 128, "max_prompt_tokens": 32, "max_tokens": 96,
            "rollout_concurrency": 16,
        },
        "reward": {"scorers": [{"name": "words", "kind": "function", "source": "length"}]},
        "learner": {"batch": 8, "steps": 4, "epochs": 1, "learning_rate": 1e-3, "schedule": "constant", "max_staleness": 2},
        "data": {"prompts": str(prompts)},
        "conductor": {"start_from": str(model), "response_tokens": 12, "fixed_length": True, "max_in_flight": 64},
    }  # fmt: skip
    return merged(tree, sections)


def merged(tree: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A run file with some keys of its sections replaced."""
    return {**tree, **{name: {**tree.get(name, {}), **section} for name, section in sections.items()}}


def settings_of(tree: Mapping[str, Any]) -> RunSettings:
    return RunSettings.model_validate(dict(tree))


def write_run_file(path: Path, tree: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(tree)))
    return path


def environment(*import_from: Path, **variables: str) -> dict[str, str]:
    """For a child process that runs honed from this working tree."""
    path = os.pathsep.join(map(str, (SERVICES, *import_from)))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}


async def until(claim: Callable[[], Any | Awaitable[Any]], timeout_s: float, what: str, every_s: float = 0.02) -> Any:
    """Polls what has no event: another process's files and states. Returns the first true answer."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                answer = claim()
                if asyncio.iscoroutine(answer):
                    answer = await answer
                if answer:
                    return answer
                await asyncio.sleep(every_s)
    except TimeoutError as error:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from error


def step_of(directory: Path) -> int:
    """The last step in the learner's book."""
    steps = read_updates(Workspace(directory).learner)
    return steps[-1].step if steps else 0


class Supervisor(Protocol):
    """A launcher or a fleet."""

    def states(self) -> list[ProcessState]: ...


def process(launcher: Supervisor, name: str) -> ProcessState:
    return next(state for state in launcher.states() if state.name == name)


async def kill(launcher: Supervisor, name: str, timeout_s: float = 90.0) -> None:
    """SIGKILL; returns when the service serves again."""
    state = process(launcher, name)
    restarts = state.restarts
    assert state.pid is not None
    os.kill(state.pid, signal.SIGKILL)
    await until(lambda: state.restarts > restarts and state.ready, timeout_s, f"{name} serves again")


async def read_books(link: RedisLink, run: str) -> dict[str, StageStats]:
    return {stage: await WorkQueue(link, RunKeys(run), stage, "test-reader").stats() for stage in STAGES}


def check_books(books: Mapping[str, StageStats], steps: Sequence[UpdateRecord]) -> dict[str, int]:
    """Every rollout that was produced trained exactly once, or left under a reason. Returns the reasons."""
    ids = [rollout for step in steps for rollout in step.rollout_ids]
    assert [i for i, n in Counter(ids).items() if n > 1] == [], "rollouts that trained twice"
    for stage, stats in books.items():
        assert (stage, stats.depth, stats.balance) == (stage, 0, 0)
    reasons: dict[str, int] = {}
    for stage in (ROLLOUTS, SCORED):
        for reason, count in {**books[stage].dropped, f"dead_{stage}": books[stage].dead}.items():
            reasons[reason] = reasons.get(reason, 0) + count
    assert books[ROLLOUTS].came_in == len(ids) + sum(reasons.values())
    assert books[SCORED].acked == len(ids)
    return {reason: count for reason, count in reasons.items() if count}


@dataclass
class Tap:
    """Every rollout that went by, and what it was scored."""

    rollouts: dict[str, common_pb2.Rollout]
    scored: dict[str, common_pb2.ScoredRollout] = field(default_factory=dict)


@asynccontextmanager
async def tapped(link: RedisLink, run: str) -> AsyncIterator[Tap]:
    """Reads along the stream `scored`, and changes nothing there."""
    tap = Tap({})

    async def read() -> None:
        stream, last = RunKeys(run).stream(SCORED), "-"
        while True:
            for entry, fields in await link.command("XRANGE", stream, last, "+"):
                scored = common_pb2.ScoredRollout.FromString(fields[b"body"])
                tap.rollouts[scored.rollout.rollout_id] = scored.rollout
                tap.scored[scored.rollout.rollout_id] = scored
                last = f"({entry.decode()}"
            await asyncio.sleep(0.02)

    task = asyncio.create_task(read())
    try:
        yield tap
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
