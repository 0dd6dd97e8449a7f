"""Real servers in a thread with an event loop of their own, for clients that block."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from honed.kit.errors import InvalidArgument, Overloaded
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.kit.tokens import TokenTable, ensure_local_tokens
from honed.preference.service import ImportBatch, PreferenceService
from honed.preference.store import PreferenceStore
from honed.v1 import (
    common_pb2,
    conductor_pb2,
    conductor_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    learner_pb2,
    learner_pb2_grpc,
    preference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
)

VERSIONS = 250


class Loop:
    """An event loop in a thread; what was entered is left in reverse order."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()

    def run(self, work: Awaitable[Any]) -> Any:
        async def awaited() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result(60)

    def enter(self, manager: Any) -> Any:
        return self.run(self._stack.enter_async_context(manager))

    def serve(self, servicer: Servicer, tokens: Path, port: int = 0) -> str:
        """Serves until the end; returns the address."""
        server = Server(
            [Listener("127.0.0.1", port, [servicer])],
            ServerOptions(tokens=TokenTable.load(tokens / "table.json"), drain_s=1.0),
        )
        self.run(server.start())
        self._stack.push_async_callback(server.stop)
        return f"127.0.0.1:{server.ports[0]}"

    def close(self) -> None:
        self.run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


def announce(directory: Path, **addresses: str) -> None:
    """Writes what a launcher writes when its run is up."""
    tree = {**addresses, "token_file": "tokens/application.token"}
    (directory / "endpoints.json").write_text(json.dumps(tree))


def make_tokens(directory: Path) -> Path:
    ensure_local_tokens(directory / "tokens")
    return directory / "tokens"


def preference(loop: Loop, directory: Path, batch: ImportBatch | None = None) -> Servicer:
    """The real service on a fresh SQLite file."""
    ids = itertools.count(1)
    store = PreferenceStore(
        f"sqlite:///{directory}/record.db",
        clock=lambda: 1_800_000_000_000_000,
        new_id=lambda: f"snapshot-{next(ids)}",
    )
    service = PreferenceService(loop.enter(store), batch)
    add = preference_pb2_grpc.add_PreferenceServiceServicer_to_server
    return Servicer("honed.v1.PreferenceService", add, service)


class Generation(generation_pb2_grpc.GenerationServiceServicer):
    """Answers with the words that it has by heart; each test may make it fail first."""

    WORDS = ("a ", "fine ", "film")

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.hanging = False
        self.aborted = threading.Event()

    def _sample(self, index: int, start: int, end: int, logprobs: bool) -> generation_pb2.Sample:
        """Version 1.4 sampled the first two words, version 1.5 the third."""
        sample = generation_pb2.Sample(index=index, text="".join(self.WORDS[start:end]), token_ids=range(10 + start, 10 + end))
        for first, last, step in ((0, 2, 4), (2, 3, 5)):
            if max(start, first) < min(end, last):
                version = common_pb2.PolicyVersion(run="demo", fence=1, step=step)
                sample.version_spans.add(version=version, start=max(start, first), end=min(end, last))
        if logprobs:
            sample.logprobs.extend([-0.5] * (end - start))
        if end == len(self.WORDS):
            sample.finish_reason = common_pb2.FINISH_REASON_LENGTH
        return sample

    def _best(self, request: Any) -> list[generation_pb2.Sample]:
        """Of the candidates the last is worth most."""
        samples = []
        for index in range(request.best_of.candidates - 1, request.best_of.candidates - 1 - request.n, -1):
            sample = self._sample(index, 0, len(self.WORDS), request.logprobs)
            sample.reward = index / 2
            sample.scores.add(scorer="length", scorer_version="v1", value=index / 4, weight=2)
            samples.append(sample)
        return samples

    def _seen(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if request.sampling.max_tokens > 128:
            raise InvalidArgument("sampling.max_tokens", "is over this server's cap of 128")
        if self.failures:
            raise self.failures.pop(0)

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> generation_pb2.GenerateResponse:
        self._seen(request, context)
        if self.hanging:
            await asyncio.Event().wait()
        end = request.sampling.max_tokens or len(self.WORDS)
        samples = [self._sample(index, 0, min(end, 3), request.logprobs) for index in range(request.n)]
        if request.HasField("best_of"):
            samples = self._best(request)
        return generation_pb2.GenerateResponse(samples=samples, prompt_token_ids=[1, 2])

    async def StreamGenerate(
        self, request: generation_pb2.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        self._seen(request, context)
        if request.HasField("best_of"):
            for sample in self._best(request):
                yield generation_pb2.StreamGenerateResponse(delta=sample)
            return
        try:
            for place in range(len(self.WORDS)):
                for index in range(request.n):
                    delta = self._sample(index, place, place + 1, request.logprobs)
                    yield generation_pb2.StreamGenerateResponse(delta=delta)
                if self.hanging:
                    await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.set()
            raise

    async def GetPolicy(self, request: generation_pb2.GetPolicyRequest, context: Any) -> generation_pb2.GetPolicyResponse:
        return generation_pb2.GetPolicyResponse(
            version=common_pb2.PolicyVersion(run="demo", fence=1, step=5),
            engine="recorded 1",
            samples_finished=8,
            tokens_sampled=100,
            busy_seconds=2.0,
        )

    def servicer(self) -> Servicer:
        add = generation_pb2_grpc.add_GenerationServiceServicer_to_server
        return Servicer("honed.v1.GenerationService", add, self)


class RewardByLength(reward_pb2_grpc.RewardServiceServicer):
    """A response is worth its length; the word "broken" breaks it."""

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        response = reward_pb2.ScoreResponse()
        for index, item in enumerate(request.items):
            if item.text == "broken":
                raise InvalidArgument(f"items[{index}].text", "cannot be scored")
            length = float(len(item.text or item.token_ids.ids) + len(item.prompt.reference))
            result = response.results.add(id=item.id, reward=2 * length)
            result.scores.add(scorer="length", scorer_version="v1", value=length, weight=2)
        return response

    def servicer(self) -> Servicer:
        return Servicer("honed.v1.RewardService", reward_pb2_grpc.add_RewardServiceServicer_to_server, self)


class Learner(learner_pb2_grpc.LearnerServiceServicer):
    async def GetStatus(self, request: learner_pb2.GetStatusRequest, context: Any) -> learner_pb2.GetStatusResponse:
        return learner_pb2.GetStatusResponse(
            state=learner_pb2.LEARNER_STATE_TRAINING,
            version=common_pb2.PolicyVersion(run="demo", fence=1, step=5),
            target_steps=40,
            rollouts_trained=1280,
            rollouts_dropped={"stale": 3},
            versions_pushed=5,
        )

    def servicer(self) -> Servicer:
        return Servicer("honed.v1.LearnerService", learner_pb2_grpc.add_LearnerServiceServicer_to_server, self)


class Conductor(conductor_pb2_grpc.ConductorServiceServicer):
    """A run in its online loop, with many versions."""

    async def GetRun(self, request: conductor_pb2.GetRunRequest, context: Any) -> conductor_pb2.GetRunResponse:
        run = conductor_pb2.Run(
            run="demo",
            phase=conductor_pb2.RUN_PHASE_PPO,
            phase_progress=0.125,
            queue_depth={"scored": 7},
            prompts_admitted=1500,
        )
        run.processes.add(name="learner", healthy=True, restarts=1, last_exit="killed by SIGKILL")
        run.processes.add(name="reward-model", healthy=True, log_tail=["reading [pairs]", "the loss is NaN"])
        return conductor_pb2.GetRunResponse(run=run)

    async def ListVersions(
        self, request: conductor_pb2.ListVersionsRequest, context: Any
    ) -> conductor_pb2.ListVersionsResponse:
        start, size = int(request.page.page_token or 0), request.page.page_size
        response = conductor_pb2.ListVersionsResponse(next_page_token=str(start + size) if start + size < VERSIONS else "")
        for step in range(VERSIONS - start, max(VERSIONS - start - size, 0), -1):
            info = response.versions.add(bytes=3_400_000, manifest_sha256="ab" * 32)
            info.version.CopyFrom(common_pb2.PolicyVersion(run="demo", fence=1, step=step))
            info.lineage.parent = f"1.{step - 1}"
            info.lineage.created_at.FromJsonString("2026-01-01T00:00:00Z")
            if step == VERSIONS:
                info.lineage.figures.update({"average_decay": 0.992, "average_updates": 249.0})
        return response

    def servicer(self) -> Servicer:
        return Servicer("honed.v1.ConductorService", conductor_pb2_grpc.add_ConductorServiceServicer_to_server, self)


def full(*, retry_after_s: float = 2.0) -> Exception:
    return Overloaded("the queue is full", retry_after_s)


Invoke = Callable[[Sequence[str]], Any]
