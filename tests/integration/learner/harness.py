"""The real learner process on a recorded stream of scored rollouts, and a generator that only says yes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from tests.support.run import environment, run_tree, settings_of, until, write_run_file
from tests.support.tiny import publish_version

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.kit.tokens import ensure_local_tokens
from honed.learner.loop.journal import read_updates
from honed.queue.messages import Message
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc
from honed.workspace import Workspace


class Yes(generation_pb2_grpc.GenerationControlServiceServicer):
    """A generator that takes every version, unless `refusing`; it remembers what it serves."""

    def __init__(self) -> None:
        self.serving: list[str] = []
        self.refusing = False
        self.traceparents: list[str] = []

    async def PrepareVersion(self, request: Any, context: Any) -> generation_pb2.PrepareVersionResponse:
        if self.refusing:
            await context.abort(grpc.StatusCode.DATA_LOSS, "damaged, it says")
        return generation_pb2.PrepareVersionResponse()

    async def CommitVersion(self, request: Any, context: Any) -> generation_pb2.CommitVersionResponse:
        self.serving.append(f"{request.version.fence}.{request.version.step}")
        self.traceparents.append(str(dict(context.invocation_metadata() or ()).get("traceparent", "")))
        return generation_pb2.CommitVersionResponse(version=request.version, pause=Duration(nanos=1000))


@asynccontextmanager
async def a_generator() -> AsyncIterator[tuple[Yes, str]]:
    """Serves it; yields it with its address."""
    generator = Yes()
    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationControlServiceServicer_to_server(generator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield generator, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def recorded(count: int, batch: int, seed: int = 0) -> Iterator[Message]:
    """Scored rollouts as a loop would have made them; each batch sampled by the version one before its own."""
    chance = random.Random(seed)
    for number in range(count):
        length = chance.randint(4, 12)
        version = common_pb2.PolicyVersion(run="small", fence=1, step=max(0, number // batch - 1))
        rollout = common_pb2.Rollout(
            rollout_id=f"small-{number}/0",
            group_id=f"small-{number}",
            run="small",
            prompt_token_ids=[chance.randrange(2, 258) for _ in range(5)],
            response_token_ids=[chance.randrange(2, 258) for _ in range(length)],
            logprobs=[chance.uniform(-7.0, -4.0) for _ in range(length)],
            version_spans=[common_pb2.VersionSpan(version=version, start=0, end=length)],
            sampling=common_pb2.SamplingParams(max_tokens=12, temperature=1.0),
        )
        scored = common_pb2.ScoredRollout(rollout=rollout, reward=chance.gauss(0, 1))
        yield Message(rollout.rollout_id, scored.SerializeToString())


class Learner:
    """A run's directory and the learner processes that work in it, one after another."""

    def __init__(
        self, root: Path, run: str, redis_url: str, generators: Sequence[str], *, samples: int = 1, **learner: Any
    ) -> None:
        root.mkdir(parents=True, exist_ok=True)
        tree = run_tree(root, learner={"epochs": 2, "minibatches": 2, **learner})
        tree["run"] = run
        tree["queue"]["lease_s"] = 30.0
        tree["generation"]["control_address"] = generators[0]
        tree["conductor"]["samples_per_prompt"] = samples
        self.tree, self.root, self.redis_url = tree, root, redis_url
        self.settings: RunSettings = settings_of(tree)
        self.place = Workspace(self.settings.directory)
        self.store = PolicyStore(self.settings.policy_url, run)
        publish_version(self.store, root / "model", VersionId(0, 0))
        ensure_local_tokens(self.settings.tokens_directory)
        self.file = root / "run.yaml"
        self.write()
        self.log = root / "learner.log"

    def write(self) -> None:
        """Writes the run file of what the tree holds now."""
        write_run_file(self.file, self.tree)

    @asynccontextmanager
    async def process(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """The learner as the launcher starts it; killed at the end if it still runs."""
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "honed.cli.main", "serve", "learner", "--run-file", str(self.file)),
                env=environment(HONED_QUEUE__URL=self.redis_url),
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def checkpoint(self) -> Path | None:
        """The newest checkpoint's directory."""
        found = sorted(p for p in (self.place.learner / "checkpoints").glob("*-step-*") if not p.name.startswith("."))
        return found[-1] if found else None

    async def checkpointed(self, step: int, process: asyncio.subprocess.Process, timeout_s: float = 120.0) -> Path:
        """Waits for the checkpoint of a step, or a later one."""

        def there() -> Path | None:
            assert process.returncode is None, self.log.read_text()[-2000:]
            found = self.checkpoint()
            return found if found is not None and int(found.name.rpartition("-")[2]) >= step else None

        path: Path = await until(there, timeout_s, f"a checkpoint of step {step}", every_s=0.005)
        return path

    async def updated(self, step: int, process: asyncio.subprocess.Process, timeout_s: float = 120.0) -> None:
        """Waits until the journal has an update."""

        def there() -> bool:
            assert process.returncode is None, self.log.read_text()[-2000:]
            updates = read_updates(self.place.learner)
            return bool(updates) and updates[-1].step >= step

        await until(there, timeout_s, f"update {step}", every_s=0.005)
