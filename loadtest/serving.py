"""The server process of the benchmarks: what `honed serve generation` runs, less Redis and the rollout worker.

The listeners, the interceptor with its token check and metrics, the services and the engine are the product's own, composed as
`honed.generation.main` composes them. Commands come as JSON lines on stdin, replies leave as JSON lines on stdout; the first
line is the `Setup`. The process ends when stdin closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import json
import os
import pstats
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from honed.artifacts.store import PolicyStore
from honed.conductor.settings import ConductorSettings
from honed.config import RunSettings
from honed.generation.best_of import BestOf
from honed.generation.control import GenerationControlService
from honed.generation.engine import InitialVersion
from honed.generation.frontend import SamplingFrontend
from honed.generation.main import CONTROL, PUBLIC, limits, make_gate
from honed.generation.make_engine import make_engine
from honed.generation.scoring import CandidateScoring
from honed.generation.service import GenerationService
from honed.generation.settings import GenerationSettings
from honed.generation.vllm.engine import VLLMEngine
from honed.kit.server import Listener, Server, Servicer
from honed.runtime import server_options
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc
from honed.workspace import Workspace
from loadtest.bare import BareEngine
from loadtest.work import Plan

RUN = "loadtest"
_PROFILE_LINES = 45


@dataclass(frozen=True)
class Setup:
    """What to serve.

    Attributes:
        directory: An empty directory for the policy store and the tokens.
        model: A Hugging Face model directory; None makes a tiny one with random weights.
        versions: How many versions to publish; the first one is served.
        concurrency: Requests that the engine runs at once.
        threads: Compute threads of the engine on a CPU.
        dtype: Of weights and activations.
        gigabytes: Size of the model to make; 0 makes the tiny one.
        staged: Load new weights beside those that serve.
    """

    directory: str
    model: str | None = None
    versions: int = 1
    concurrency: int = 64
    threads: int = 1
    dtype: str = "float32"
    gigabytes: float = 0.0
    staged: bool = True

    def settings(self) -> RunSettings:
        """The settings of the run that this is."""
        generation = GenerationSettings.model_validate(
            {
                "engine": "vllm",
                "dtype": self.dtype,
                "canary_tolerance": None if self.dtype == "float32" else 0.2,
                "max_num_seqs": self.concurrency,
                "max_queued": max(512, 4 * self.concurrency),
                "threads": self.threads,
                "max_model_tokens": 512,
                "max_prompt_tokens": 256,
                "max_tokens": 192,
                "staged_load": self.staged,
            }
        )
        conductor = ConductorSettings(response_tokens=generation.max_tokens)
        return RunSettings(run=RUN, directory=Path(self.directory), generation=generation, conductor=conductor)


async def main() -> None:
    """Serves until stdin closes."""
    replies, commands = _take_stdout(), await _stdin()
    setup = Setup(**json.loads(await commands.readline()))
    settings = setup.settings()
    store = PolicyStore(settings.policy_url, settings.run)
    published, initial = await asyncio.to_thread(_publish, setup, settings, store)
    gate = make_gate(settings.generation)
    engine = make_engine(settings.generation, initial, gate)
    assert isinstance(engine, VLLMEngine)
    frontend = SamplingFrontend(engine, gate, limits(settings.generation), settings.run)
    service = GenerationService(frontend, BestOf(frontend, CandidateScoring(settings)))
    control = GenerationControlService(frontend, store, _versions(settings))
    host = settings.generation.host
    server = Server(
        [
            Listener(host, 0, [Servicer(PUBLIC, generation_pb2_grpc.add_GenerationServiceServicer_to_server, service)]),
            Listener(host, 0, [Servicer(CONTROL, generation_pb2_grpc.add_GenerationControlServiceServicer_to_server, control)]),
        ],
        server_options(settings, settings.generation),
    )
    await server.start()
    try:
        await engine.start()
        await server.ready()
        targets = [f"{host}:{port}" for port in server.ports]
        tokens = settings.tokens_directory / "operator.token"
        _reply(replies, {"target": targets[0], "control": targets[1], "token_file": str(tokens), **published})
        await _obey(commands, replies, Bench(BareEngine(engine), service))
    finally:
        await server.stop()
        await engine.close()


class Bench:
    """What the benchmark asks of this process. Each public method is a command; its arguments are the command's fields."""

    def __init__(self, bare: BareEngine, service: GenerationService) -> None:
        """Runs the bare side by `bare`, after a look at what `service` does."""
        self._bare = bare
        self._service = service
        self._profile = cProfile.Profile()

    async def copy(self, stream: bool, logprobs: bool) -> dict[str, Any]:
        """Makes one call of the service in this process; the bare side sends what it sent from here on."""

        async def serve() -> None:
            prompt = generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=[1, 2, 3]))
            sampling = common_pb2.SamplingParams(max_tokens=2, fixed_length=True)
            if stream:
                streamed = generation_pb2.StreamGenerateRequest(prompt=prompt, sampling=sampling, logprobs=logprobs)
                async for _ in self._service.StreamGenerate(streamed, None):
                    pass
            else:
                whole = generation_pb2.GenerateRequest(prompt=prompt, sampling=sampling, logprobs=logprobs)
                await self._service.Generate(whole, None)

        return {"parameters": await self._bare.copy_from(serve)}

    async def bare(self, concurrency: int, plan: dict[str, Any]) -> dict[str, Any]:
        """Runs the bare side."""
        return asdict(await self._bare.run(Plan(**plan).work(), concurrency))

    async def cpu(self) -> dict[str, Any]:
        """Processor seconds of this process so far."""
        return {"cpu_seconds": time.process_time()}

    async def profile(self, on: bool, file: str = "") -> dict[str, Any]:
        """Begins to watch the event loop's thread; or ends it, writes the raw profile, and answers with the hot spots."""
        if on:
            self._profile = cProfile.Profile()
            self._profile.enable()
            return {}
        self._profile.disable()
        self._profile.dump_stats(file)
        return {"hot": _hot_spots(self._profile)}


def _versions(settings: RunSettings) -> Path:
    return Workspace(settings.directory).generators / "versions"


def _publish(setup: Setup, settings: RunSettings, store: PolicyStore) -> tuple[dict[str, Any], InitialVersion]:
    from loadtest.material import make_large_model, make_model, publish

    place = Workspace(settings.directory)
    model = Path(setup.model) if setup.model else place.base_model
    if setup.model is None and setup.gigabytes:
        make_large_model(model, setup.gigabytes)
    elif setup.model is None:
        make_model(model)
    published = publish(store, model, place.root / "export", setup.versions)
    first = published.manifests[0].version
    initial = InitialVersion(first, store.fetch(first, _versions(settings)))
    manifests = [[m.version.fence, m.version.step, m.digest] for m in published.manifests]
    return {"versions": manifests, "vocabulary": published.vocabulary, "model": str(model)}, initial


async def _obey(commands: asyncio.StreamReader, replies: TextIO, bench: Bench) -> None:
    while line := await commands.readline():
        fields = json.loads(line)
        command: Callable[..., Awaitable[dict[str, Any]]] = getattr(bench, fields.pop("do"))
        _reply(replies, await command(**fields))


def _hot_spots(profile: cProfile.Profile) -> list[dict[str, Any]]:
    """The functions with the most time of their own: seconds, seconds with callees, calls, name."""
    stats = pstats.Stats(profile).get_stats_profile()
    profiles = sorted(stats.func_profiles.items(), key=lambda item: item[1].tottime, reverse=True)[:_PROFILE_LINES]
    return [
        {"own_s": p.tottime, "total_s": p.cumtime, "calls": p.ncalls, "where": f"{_short(p.file_name)}:{p.line_number} {name}"}
        for name, p in profiles
    ]


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-3:])


def _take_stdout() -> TextIO:
    """Keeps stdout for replies; whatever else prints there, in vLLM's processes too, goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


async def _stdin() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def _reply(replies: TextIO, value: dict[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # the terminal sends it to the whole group; the benchmark says what happened
        asyncio.run(main())
