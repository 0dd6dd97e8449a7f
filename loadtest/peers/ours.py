"""honed on the task: the whole of `honed up`, with its services, Redis, a push of each version and checkpoints."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import loadtest
from honed.v1 import learner_pb2
from loadtest.live_run import live_run
from loadtest.peers.compare import Training, Update
from loadtest.peers.task import PROMPT_TOKENS, Task
from loadtest.resources import cpu_seconds, descendants

_SCORER = "loadtest_vowel_share"


def run_tree(root: Path, task: Task, engine: str) -> dict[str, Any]:
    """The run file: the task's numbers, and defaults but for what the peers do not have."""
    length = PROMPT_TOKENS + task.tokens
    return {
        "run": "peers",
        "directory": str(root / "run"),
        "seed": task.seed,
        "data": {"prompts": task.prompts},
        "conductor": {
            "start_from": task.model,
            "response_tokens": task.tokens,
            "fixed_length": True,
            "samples_per_prompt": task.group,
        },
        "generation": {
            "engine": engine,
            "max_model_tokens": length,
            "max_prompt_tokens": PROMPT_TOKENS,
            "max_tokens": task.tokens,
            "default_max_tokens": task.tokens,
            "kv_cache_gib": 0.25,
        },
        "reward": {"scorers": [{"name": "vowels", "kind": "function", "source": _SCORER}]},
        "learner": {
            "algorithm": task.algorithm,
            "options": {"whiten_rewards": False} if task.algorithm == "ppo" else {},
            "batch": task.batch,
            "epochs": task.epochs,
            "optimizer": "adamw",
            "learning_rate": task.learning_rate,
            "precision": task.precision,
            "reward_normalisation": "none",
            "overlap_push": True,  # nobody else waits for the generator
            "own_cores": task.own_cores or None,
            "checkpoint_every": 10,  # the peers write none
            "kl": {"controller": "fixed", "coefficient": task.kl},
            "steps": None,
        },
    }


async def train(root: Path, task: Task, engine: str) -> Training:
    """Runs until so many seconds after the first update."""
    with _scorer(root / "scorer"):
        async with live_run(root, run_tree(root, task, engine)) as run:
            before = time.time(), cpu_seconds(descendants(run.process.pid))
            await asyncio.sleep(task.seconds)
            after = time.time(), cpu_seconds(descendants(run.process.pid))
            found = []
            async for answer in run.learner.WatchMetrics(learner_pb2.WatchMetricsRequest(no_follow=True), timeout=60):
                metrics = answer.metrics
                found.append(Update(metrics.ended_at.ToNanoseconds() / 1e9, metrics.values["score_mean"]))
    return Training(found, (before, after))


@contextmanager
def _scorer(directory: Path) -> Iterator[None]:
    """Offers the task's reward as an installed package does, to processes that are started meanwhile."""
    facts = directory / "loadtest_peers-1.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: loadtest-peers\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(f"[honed.scorers]\n{_SCORER} = loadtest.peers.task:vowel_share\n")
    before = os.environ.get("PYTHONPATH")
    places = (str(directory), str(Path(loadtest.__file__).parents[1]), *([before] if before else []))
    os.environ["PYTHONPATH"] = os.pathsep.join(places)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
