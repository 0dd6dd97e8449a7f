"""A whole run for a load test: `honed up` as a user starts it, in a process of its own, and what the test asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import yaml

from honed._client.endpoints import Endpoints
from honed.kit.channel import connect
from honed.kit.tokens import read_token
from honed.v1 import conductor_pb2, conductor_pb2_grpc, generation_pb2_grpc, learner_pb2, learner_pb2_grpc
from loadtest.work import random_text

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 10.0
_PROMPTS = 512


def run_tree(root: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """The run file of an endless loop on a tiny random model, with what a test changes merged into its sections."""
    from loadtest.material import make_model

    model, prompts = root / "model", root / "prompts.jsonl"
    if not model.exists():
        make_model(model)
    if not prompts.exists():
        words = random.Random(1)
        prompts.write_text("".join(f'{{"text": "{random_text(words, 6)}"}}\n' for _ in range(_PROMPTS)))
    tree: dict[str, Any] = {
        "run": "loadtest",
        "directory": str(root / "run"),
        "seed": 1,
        "data": {"prompts": str(prompts)},
        "conductor": {"start_from": str(model), "response_tokens": 24, "fixed_length": True, "max_in_flight": 256},
        "generation": {"max_model_tokens": 256, "max_prompt_tokens": 128, "max_tokens": 128, "kv_cache_gib": 0.25},
        "reward": {"scorers": [{"name": "length", "kind": "function", "source": "length"},
                               {"name": "repetition", "kind": "function", "source": "repetition"}]},
        "learner": {"batch": 64, "epochs": 1, "learning_rate": 1e-5, "steps": None},
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return tree


@dataclass
class LiveRun:
    """A run that is up."""

    directory: Path
    process: subprocess.Popen[bytes]
    endpoints: Endpoints
    channels: dict[str, grpc.aio.Channel]

    @property
    def conductor(self) -> conductor_pb2_grpc.ConductorServiceAsyncStub:
        """The conductor, with the operator's token."""
        return conductor_pb2_grpc.ConductorServiceStub(self.channels["conductor"])

    @property
    def learner(self) -> learner_pb2_grpc.LearnerServiceAsyncStub:
        """The learner, with the operator's token."""
        return learner_pb2_grpc.LearnerServiceStub(self.channels["learner"])

    @property
    def generation(self) -> generation_pb2_grpc.GenerationServiceAsyncStub:
        """The generators, through the standard channel with its retries."""
        return generation_pb2_grpc.GenerationServiceStub(self.channels["generation"])

    def operator_metadata(self) -> list[tuple[str, str]]:
        """What a bare channel sends along to be let in."""
        file = self.endpoints.operator_token_file
        return [("authorization", f"Bearer {read_token(file)}")] if file else []

    async def get_run(self) -> conductor_pb2.Run:
        """Where the run stands."""
        answer = await self.conductor.GetRun(conductor_pb2.GetRunRequest(), timeout=CALL_TIMEOUT_S, wait_for_ready=True)
        return answer.run

    async def status(self) -> learner_pb2.GetStatusResponse | None:
        """Where the learner stands; None while it does not answer."""
        try:
            return await self.learner.GetStatus(learner_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None

    async def reach_update(self, update: int, timeout_s: float) -> None:
        """Waits until the learner has made so many updates.

        Raises:
            TimeoutError: it has not in time.
            RuntimeError: the run ended.
        """
        async with asyncio.timeout(timeout_s):
            while True:
                status = await self.status()
                if status is not None and status.version.step >= update:
                    return
                if self.process.poll() is not None:
                    raise RuntimeError(f"the run ended with code {self.process.returncode}; see {self.directory / 'up.log'}")
                await asyncio.sleep(0.2)


@asynccontextmanager
async def live_run(root: Path, tree: Mapping[str, Any], *arguments: str) -> AsyncIterator[LiveRun]:
    """Starts `honed up` on the run file; ends it with the block, and everything that it started.

    Args:
        root: where the run file and the log of `honed up` go.
        tree: the run file.
        arguments: more arguments of `honed up`.

    Raises:
        TimeoutError: the generation service did not serve in time.
        RuntimeError: the run ended before that.
    """
    run_file, log = root / "run.yaml", root / "up.log"
    run_file.write_text(yaml.safe_dump(dict(tree)))
    command = [sys.executable, "-m", "honed.cli.main", "up", "--run-file", str(run_file), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220  # starts at once
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    run = LiveRun(Path(str(tree["directory"])), process, Endpoints(Path(str(tree["directory"]))), {})
    try:
        await _serving(run, log)
        yield run
    finally:
        for channel in run.channels.values():
            await channel.close()
        await asyncio.to_thread(_stop, process)


async def _serving(run: LiveRun, log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        if run.process.poll() is not None:
            raise RuntimeError(f"`honed up` ended with code {run.process.returncode}; see {log}")
        with contextlib.suppress(ValueError):
            run.endpoints = Endpoints.read(run.directory)
            break
        if time.monotonic() > end:
            raise TimeoutError(f"no endpoints after {START_TIMEOUT_S:g} s; see {log}")
        await asyncio.sleep(0.2)
    for name in run.endpoints.addresses:
        files = run.endpoints.token_file if name == "generation" else run.endpoints.operator_token_file
        run.channels[name] = connect(run.endpoints.address(name), read_token(files) if files else None)
    await run.reach_update(1, START_TIMEOUT_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
