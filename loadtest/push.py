"""How long a push of new weights holds requests up, through the real control service, under load.

`--in-flight` requests are kept running over gRPC while versions of the model, all published
beforehand, are brought in one after the other by PrepareVersion and CommitVersion, as the learner's
publisher does. Reported: the pause that the service states for each commit (from the freeze to the
moment that sampled tokens may leave again), the time of both calls as the caller sees it, requests
that were in flight at a pause and went on, requests whose tokens came from more than one version,
and those that failed, of which there must be none; and the longest that a streaming client waited
for its next token while a version was prepared, beside the same while nothing was pushed; and what
the generator holds at the end, and its growth in the last third of many pushes.

The bar: `--make` GB or `--model` hold the 95th percentile of the pause against what the bytes and
the canaries take on this machine (`pause_bound`), the tiny model against 80 ms. `ratio` is the
percentile over the bar: below 1 is good.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import grpc
import typer

from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc
from loadtest import report
from loadtest.generator import Generator, Version, started
from loadtest.pause_bound import PauseBound, measure_bound
from loadtest.scratch import scratch_directory
from loadtest.serving import RUN, Setup
from loadtest.stats import percentile
from loadtest.work import Plan, Work, parse_range

TINY_BAR_S = 0.08
STREAMS = 4
CALL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Push:
    """One push; times in seconds, what the generator holds afterwards in bytes."""

    pause: float
    prepare: float
    commit: float
    carried: int
    canary_max_error: float
    preparing: tuple[float, float]
    ended: float
    memory: int


@dataclass
class Traffic:
    """What became of the requests around the pushes."""

    succeeded: int = 0
    failed: int = 0
    spanning: int = 0
    tokens: int = 0
    reasons: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)  # from one token of a stream to the next

    def longest_gap(self, spans: Sequence[tuple[float, float]], *, outside: bool = False) -> float | None:
        """The longest gap that began and ended inside one of the spans; or that none of them touches."""

        def counts(start: float, end: float) -> bool:
            if outside:
                return all(end < first or start > last for first, last in spans)
            return any(first <= start and end <= last for first, last in spans)

        return max((end - start for start, end in self.gaps if counts(start, end)), default=None)

    def add(self, sample: generation_pb2.Sample, asked: int) -> None:
        """Takes note of an answer; one of another length than was asked for is a failure."""
        if len(sample.token_ids) != asked:
            self.failed += 1
            self.reasons.append(f"{len(sample.token_ids)} tokens came, {asked} were asked for")
            return
        self.succeeded += 1
        self.tokens += asked
        self.spanning += len(sample.version_spans) > 1


async def keep_in_flight(
    stub: generation_pb2_grpc.GenerationServiceAsyncStub,
    work: Sequence[Work],
    in_flight: int,
    stopping: asyncio.Event,
    traffic: Traffic,
) -> None:
    """Sends requests, `in_flight` at a time, until `stopping` is set; then waits for the last answers."""
    turn = itertools.cycle(work)

    async def one() -> None:
        while not stopping.is_set():
            each = next(turn)
            request = generation_pb2.GenerateRequest(
                prompt=generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=each.prompt)),
                sampling=common_pb2.SamplingParams(max_tokens=each.tokens, fixed_length=True),
                logprobs=True,
            )
            try:
                answer = await stub.Generate(request, timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                traffic.failed += 1
                traffic.reasons.append(f"{error.code().name}: {error.details()}")
            else:
                traffic.add(answer.samples[0], each.tokens)

    async def streamed() -> None:
        while not stopping.is_set():
            each = next(turn)
            request = generation_pb2.StreamGenerateRequest(
                prompt=generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=each.prompt)),
                sampling=common_pb2.SamplingParams(max_tokens=each.tokens, fixed_length=True),
            )
            last = None
            try:
                async for _ in stub.StreamGenerate(request, timeout=CALL_TIMEOUT_S):
                    now = time.perf_counter()
                    if last is not None:
                        traffic.gaps.append((last, now))
                    last = now
            except grpc.aio.AioRpcError as error:
                traffic.failed += 1
                traffic.reasons.append(f"{error.code().name}: {error.details()}")
            else:
                traffic.succeeded += 1

    async with asyncio.TaskGroup() as group:
        for number in range(in_flight):
            group.create_task(streamed() if number < min(STREAMS, in_flight // 2) else one())


async def push(generator: Generator, control: generation_pb2_grpc.GenerationControlServiceAsyncStub, version: Version) -> Push:
    """Prepares and commits a version."""
    message = common_pb2.PolicyVersion(run=RUN, fence=version.fence, step=version.step)
    key = f"push/{version.step}"
    began = time.perf_counter()
    await control.PrepareVersion(
        generation_pb2.PrepareVersionRequest(version=message, manifest_sha256=version.digest, idempotency_key=key),
        timeout=CALL_TIMEOUT_S,
    )
    prepared = time.perf_counter()
    answer = await control.CommitVersion(
        generation_pb2.CommitVersionRequest(version=message, idempotency_key=key), timeout=CALL_TIMEOUT_S
    )
    return Push(
        pause=answer.pause.ToNanoseconds() / 1e9,
        prepare=prepared - began,
        commit=time.perf_counter() - prepared,
        carried=answer.requests_carried,
        canary_max_error=answer.canary_max_error,
        preparing=(began, prepared),
        ended=time.perf_counter(),
        memory=await asyncio.to_thread(generator.memory),
    )


async def measure(
    setup: Setup, in_flight: int, tokens: tuple[int, int], interval: float
) -> tuple[list[Push], Traffic, PauseBound]:
    """Starts a generator and pushes every version but the first, which it starts with."""
    traffic, stopping = Traffic(), asyncio.Event()
    async with started(setup) as generator, generator.channel() as public, generator.channel(control=True) as private:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(public)
        control: Any = generation_pb2_grpc.GenerationControlServiceStub(private)
        bound = await asyncio.to_thread(measure_bound, generator.model, setup.threads)  # the engine is idle
        work = Plan(1, 4 * in_flight, *tokens, generator.vocabulary).work()
        async with asyncio.TaskGroup() as group:
            group.create_task(keep_in_flight(stub, work, in_flight, stopping, traffic))
            try:
                pushes = await _push_all(generator, control, interval)
            finally:
                stopping.set()
    return pushes, traffic, bound


async def _push_all(generator: Generator, control: Any, interval: float) -> list[Push]:
    versions = generator.versions[1:]
    pushes = []
    with report.progress("pause") as bar:
        task = bar.add_task("pushes", total=len(versions), pause="")
        for version in versions:
            await asyncio.sleep(interval)
            pushes.append(await push(generator, control, version))
            bar.update(task, advance=1, pause=f"{pushes[-1].pause * 1e3:.0f} ms")
    return pushes


def figures(pushes: Sequence[Push], traffic: Traffic, bound: PauseBound, bar_s: float) -> dict[str, Any]:
    """What a set of pushes came to."""

    def spread(name: str) -> dict[str, float]:
        values = [getattr(each, name) * 1e3 for each in pushes]
        shares = {"p50": 0.5, "p95": 0.95}
        return {f"{name}_{label}_ms": report.rounded(percentile(values, share)) for label, share in shares.items()}

    times = {**spread("pause"), **spread("prepare"), **spread("commit")}
    preparing = traffic.longest_gap([each.preparing for each in pushes])
    otherwise = traffic.longest_gap([(each.preparing[0], each.ended) for each in pushes], outside=True)
    return {
        "ratio": report.rounded(times["pause_p95_ms"] / bar_s / 1e3),
        **times,
        "weight_bytes": bound.weight_bytes,
        "copy_s": report.rounded(bound.copy_s),
        "forward_s": report.rounded(bound.forward_s),
        "bound_s": report.rounded(bound.bound_s),
        "bar_s": report.rounded(bar_s),
        "token_gap_preparing_ms": None if preparing is None else report.rounded(preparing * 1e3),
        "token_gap_otherwise_ms": None if otherwise is None else report.rounded(otherwise * 1e3),
        "memory_mb": report.rounded(pushes[-1].memory / 1e6),
        "memory_growth_last_third": report.rounded(_growth([each.memory for each in pushes])),
        "pushes": len(pushes),
        "requests_carried": sum(each.carried for each in pushes),
        "requests_spanning": traffic.spanning,
        "requests_succeeded": traffic.succeeded,
        "requests_failed": traffic.failed,
        "tokens": traffic.tokens,
        "canary_max_error": report.rounded(max(each.canary_max_error for each in pushes)),
    }


def _growth(values: Sequence[int]) -> float:
    """Mean of the last third over the mean of the middle third."""
    third = max(1, len(values) // 3)
    return fmean(values[-third:]) / fmean(values[-2 * third : -third] or values)


def main(
    pushes: Annotated[int, typer.Option(min=1, help="Versions to push.")] = 30,
    in_flight: Annotated[int | None, typer.Option(min=2, help="Requests in flight; 64, or 8 with --make or --model.")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens that a request samples, a range.")] = "64-128",
    interval: Annotated[float, typer.Option(min=0, help="Seconds between pushes.")] = 0.5,
    model: Annotated[Path | None, typer.Option(help="Hugging Face model directory, in place of a tiny random model.")] = None,
    make: Annotated[float, typer.Option(min=0, help="Make a random Llama of so many GB in float32.")] = 0.0,
    staged: Annotated[bool, typer.Option(help="Load new weights beside those that serve.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of the engine on a CPU.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Pushes versions under load and prints their pauses; exits 1 if a request failed."""
    large = model is not None or make > 0
    in_flight = in_flight or (8 if large else 64)
    with scratch_directory() as directory:
        chosen = str(model) if model else None
        setup = Setup(str(directory), chosen, pushes + 1, in_flight, threads, dtype, gigabytes=make, staged=staged)
        done, traffic, bound = asyncio.run(measure(setup, in_flight, parse_range(tokens), interval))
    result = figures(done, traffic, bound, bound.bound_s if large else TINY_BAR_S)
    rows = [(name.replace("_", " "), "-" if value is None else f"{value:,g}") for name, value in result.items()]
    report.show(report.figures_table(f"{pushes} pushes, {in_flight} in flight", ("", ""), rows))
    for reason in traffic.reasons[:5]:
        typer.echo(f"failed: {reason}", err=True)
    report.finish({**result, "in_flight": in_flight, "staged": staged})
    if traffic.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
