"""Two generators under load are replaced, one after the other: does a request fail?

    python -m loadtest.rolling

Whole answers and streams run all the time over the standard channel: round robin, and retries where
a call did not begin. Each generator gets SIGTERM, drains, ends, and has a successor on its ports.
The last line is one JSON object; exit status 1: a request failed, or what was in flight at a
SIGTERM was cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from honed.artifacts.store import PolicyStore
from honed.kit.channel import connect
from honed.kit.tokens import read_token
from honed.queue.connection import RedisLink
from honed.queue.embedded import embedded_redis_command, embedded_redis_url, free_port, wait_ready
from honed.queue.keys import RunKeys
from honed.queue.members import GENERATION, Members
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc
from loadtest import report
from loadtest.material import make_model, publish
from loadtest.replicas import Replicas
from loadtest.scratch import scratch_directory

RUN = "rolling"
CALL_TIMEOUT_S = 120.0
REDIS_TIMEOUT_S = 20.0
_PROMPT = tuple(range(10, 26))


class Crowd:
    """Callers that ask again as soon as they have an answer, and what became of their requests."""

    def __init__(self, channel: grpc.aio.Channel, tokens: int) -> None:
        """Each answer has `tokens` tokens."""
        self._stub = generation_pb2_grpc.GenerationServiceStub(channel)
        self._prompt = generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=_PROMPT))
        self._tokens = tokens
        self._sampling = common_pb2.SamplingParams(max_tokens=tokens, fixed_length=True)
        self.succeeded: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.cut = 0
        """Streams that had begun and did not end."""

    @asynccontextmanager
    async def asking(self, whole: int, streamed: int) -> AsyncIterator[None]:
        """So many callers of each kind ask as long as the block runs, and get their last answers."""
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for kind, call, count in (("whole", self._whole, whole), ("streamed", self._streamed, streamed)):
                for _ in range(count):
                    group.create_task(self._ask(kind, call, over))
            try:
                yield
            finally:
                over.set()

    async def _ask(self, kind: str, call: Callable[[], Awaitable[int]], over: asyncio.Event) -> None:
        while not over.is_set():
            try:
                got = await call()
            except grpc.aio.AioRpcError as error:
                self.failed[f"{kind}: {error.code().name}: {error.details()}"] += 1
            else:
                if got == self._tokens:
                    self.succeeded[kind] += 1
                else:
                    self.failed[f"{kind}: {got} tokens of {self._tokens}"] += 1

    async def _whole(self) -> int:
        request = generation_pb2.GenerateRequest(prompt=self._prompt, sampling=self._sampling)
        answer = await self._stub.Generate(request, timeout=CALL_TIMEOUT_S)
        return len(answer.samples[0].token_ids)

    async def _streamed(self) -> int:
        request = generation_pb2.StreamGenerateRequest(prompt=self._prompt, sampling=self._sampling)
        got = 0
        try:
            async for part in self._stub.StreamGenerate(request, timeout=CALL_TIMEOUT_S):
                got += len(part.delta.token_ids)
        except grpc.aio.AioRpcError:
            self.cut += got > 0
            raise
        return got


async def rolling(root: Path, engine: str, callers: int, tokens: int) -> dict[str, Any]:
    """Starts two generators, replaces each under load, and returns the figures."""
    generation = {"engine": engine, "max_model_tokens": 256, "max_prompt_tokens": 64, "max_tokens": 192, "kv_cache_gib": 0.25}
    conductor = {"response_tokens": generation["max_tokens"]}
    tree = {"run": RUN, "directory": str(root / "run"), "generation": generation, "conductor": conductor}
    await asyncio.to_thread(make_model, root / "model")
    store = PolicyStore(root / "run" / "policy", RUN)
    await asyncio.to_thread(publish, store, root / "model", root / "export", 1)
    async with _redis(root / "redis") as url, RedisLink(url) as link:
        replicas = Replicas(root, tree, url, Members(link, RunKeys(RUN), GENERATION))
        try:
            pair = [replicas.start(number) for number in (0, 1)]
            for replica in pair:
                await replicas.ready(replica)
            token = read_token(root / "run" / "tokens" / "application.token")
            async with connect("ipv4:" + ",".join(replica.address for replica in pair), token) as channel:
                crowd = Crowd(channel, tokens)
                async with crowd.asking(callers - callers // 3, callers // 3):
                    await asyncio.sleep(2.0)
                    await replicas.replace_each(pair, lambda step: typer.echo(step, err=True))
        finally:
            replicas.stop()
    return {
        "engine": engine,
        "callers": callers,
        "succeeded": dict(crowd.succeeded),
        "failed": sum(crowd.failed.values()),
        "streams_cut": crowd.cut,
        "failures": dict(crowd.failed),
    }


@asynccontextmanager
async def _redis(directory: Path) -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        *embedded_redis_command(directory, free_port()), stdout=asyncio.subprocess.DEVNULL
    )
    try:
        url = embedded_redis_url(directory)
        await wait_ready(url, REDIS_TIMEOUT_S)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


def main(
    engine: Annotated[str, typer.Option(help="vllm, transformers or auto.")] = "auto",
    callers: Annotated[int, typer.Option(min=3, help="Callers at once, a third of them streaming.")] = 24,
    tokens: Annotated[int, typer.Option(min=1, max=192, help="Tokens of each answer.")] = 96,
) -> None:
    """Replaces two generators under load."""
    with scratch_directory() as root:
        figures = asyncio.run(rolling(root, engine, callers, tokens))
    report.finish(figures)
    if figures["failed"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
