"""A crowd of applications with training beside it, and without: what does each cost the other?

    python -m loadtest.applications

A small real run is started. So many applications ask at once, each again as soon as it has its
answer; one that is told to come back later waits as long as it is told. Once while the run trains,
once with the learner paused. The last line is one JSON object; exit status 1: a bar was missed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from honed.queue.connection import RedisLink
from honed.queue.embedded import embedded_redis_url
from honed.queue.keys import STAGES, RunKeys
from honed.queue.stream import WorkQueue
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc, learner_pb2
from honed.workspace import Workspace
from loadtest import report
from loadtest.live_run import CALL_TIMEOUT_S, LiveRun, live_run, run_tree
from loadtest.scratch import scratch_directory
from loadtest.stats import Quantiles
from loadtest.work import random_text

GOODPUT_BAR = 0.8
WARM_UP_S = 5.0
QUIET_TIMEOUT_S = 120.0
CALL_DEADLINE_S = 120.0
MOST_TOKENS = 32


@dataclass
class Figures:
    """What a crowd got within its time."""

    seconds: float
    tokens: int = 0
    answers: int = 0
    told_to_wait: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """As JSON."""
        latency = Quantiles.of(self.latencies)
        return {
            "tokens_per_second": report.rounded(self.tokens / self.seconds),
            "answers": self.answers,
            "told_to_wait": self.told_to_wait,
            "failed": sum(self.failed.values()),
            "failures": dict(self.failed),
            "p50_ms": report.rounded(latency.p50_ms) if latency else None,
            "p99_ms": report.rounded(latency.p99_ms) if latency else None,
        }


async def crowd(stub: generation_pb2_grpc.GenerationServiceAsyncStub, concurrency: int, seconds: float) -> Figures:
    """Lets applications ask for so long; what they got after the first `WARM_UP_S`."""
    figures = Figures(seconds)
    begin = time.monotonic() + WARM_UP_S
    end = begin + seconds
    words = random.Random(2)

    async def application(number: int) -> None:
        prompt = generation_pb2.Prompt(text=random_text(words, 6))
        sampling = common_pb2.SamplingParams(max_tokens=MOST_TOKENS, fixed_length=True, seed=number)
        request = generation_pb2.GenerateRequest(prompt=prompt, sampling=sampling)
        while True:
            asked = time.monotonic()
            try:
                answer = await stub.Generate(request, timeout=CALL_DEADLINE_S)
            except grpc.aio.AioRpcError as error:
                if (pause_s := _retry_after_s(error)) is None:
                    figures.failed[f"{error.code().name}: {error.details()}"] += 1
                    pause_s = 1.0
                figures.told_to_wait += error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                await asyncio.sleep(pause_s * words.uniform(1.0, 1.25))
                continue
            now = time.monotonic()
            if begin <= now < end:
                figures.answers += 1
                figures.tokens += len(answer.samples[0].token_ids)
                figures.latencies.append(now - asked)

    tasks = [asyncio.create_task(application(number)) for number in range(concurrency)]
    try:
        done, _ = await asyncio.wait(tasks, timeout=end - time.monotonic(), return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return figures


async def measure(root: Path, engine: str, concurrency: int, seconds: float) -> dict[str, Any]:
    """Runs both crowds, and returns the figures."""
    tree = run_tree(root, generation={"engine": engine})
    async with live_run(root, tree) as run:
        before = await _updates(run)
        with_training = await crowd(run.generation, concurrency, seconds)
        updates = await _updates(run) - before
        dead = await _dead_letters(run, tree["run"])
        await run.learner.Pause(learner_pb2.LearnerServicePauseRequest(), timeout=QUIET_TIMEOUT_S)
        await _quiet(run)
        without = await crowd(run.generation, concurrency, seconds)
        dead = max(dead, await _dead_letters(run, tree["run"]))
    ratio = with_training.tokens / max(1, without.tokens)
    missed = []
    if ratio < GOODPUT_BAR:
        missed.append(f"goodput with training is {ratio:.2f} of that without; at least {GOODPUT_BAR:g} is asked for")
    if dead:
        missed.append(f"{dead} dead letters")
    if updates <= 0:
        missed.append("the learner made no update")
    if with_training.failed or without.failed:
        missed.append("requests failed")
    return {
        "engine": engine,
        "concurrency": concurrency,
        "seconds": seconds,
        "goodput_ratio": report.rounded(ratio),
        "updates": updates,
        "dead_letters": dead,
        "with_training": with_training.row(),
        "without": without.row(),
        "missed": missed,
    }


async def _updates(run: LiveRun) -> int:
    status = await run.status()
    if status is None:
        raise RuntimeError("the learner does not answer")
    return int(status.version.step)


async def _dead_letters(run: LiveRun, name: str) -> int:
    async with RedisLink(embedded_redis_url(Workspace(run.directory).redis)) as link:
        stats = [await WorkQueue(link, RunKeys(name), stage, "loadtest").stats() for stage in STAGES]
    return sum(stage.dead for stage in stats)


async def _quiet(run: LiveRun) -> None:
    """Waits until nothing is sampled: the learner is paused, and admission at its bound."""
    async with asyncio.timeout(QUIET_TIMEOUT_S):
        idle = 0
        while idle < 5:
            policy = await run.generation.GetPolicy(generation_pb2.GetPolicyRequest(), timeout=CALL_TIMEOUT_S)
            idle = 0 if policy.in_flight else idle + 1
            await asyncio.sleep(0.5)


def _retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    """The pause that the service asks for, None if it asks for none."""
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
            return float(info.retry_delay.ToTimedelta().total_seconds())
    return None


def main(
    seconds: Annotated[float, typer.Option(min=1, help="How long each crowd is measured.")] = 60.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Applications at once.")] = 700,
    engine: Annotated[str, typer.Option(help="vllm, transformers or auto.")] = "auto",
) -> None:
    """Measures applications with training beside them and without."""
    with scratch_directory() as root:
        figures = asyncio.run(measure(root, engine, concurrency, seconds))
    report.finish(figures)
    if figures["missed"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
