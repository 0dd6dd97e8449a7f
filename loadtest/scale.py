"""Generators come and go while the learner trains: 1, then 3, then 1 again. Does an update ever wait for it?

    python -m loadtest.scale

Prints for each phase the time from update to update, and whether the newcomers sampled what was trained. The last line is one
JSON object; exit status 1: a bar was missed.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console

from honed.v1 import conductor_pb2, generation_pb2, generation_pb2_grpc, learner_pb2
from loadtest import report
from loadtest.live_run import CALL_TIMEOUT_S, LiveRun, live_run, run_tree
from loadtest.scratch import scratch_directory

LONGEST_BAR = 2.0
READY_TIMEOUT_S = 240.0
GENERATION = "generation"


async def scale(root: Path, updates: int, engine: str) -> dict[str, Any]:
    """Runs the phases, each for so many updates after the generators are there, and returns the figures."""
    tree = run_tree(root, generation={"engine": engine}, learner={"max_staleness": 2, "batch": 256, "epochs": 2})
    async with live_run(root, tree) as run:
        phases = [("1 generator", time.time())]
        await run.reach_update(updates, READY_TIMEOUT_S + 30 * updates)
        sampled: dict[str, int] = {}
        for replicas in (3, 1):
            phases.append((f"going to {replicas}", time.time()))
            request = conductor_pb2.SetReplicasRequest(service=GENERATION, replicas=replicas)
            await run.conductor.SetReplicas(request, timeout=READY_TIMEOUT_S)
            await _until_ready(run, replicas)
            phases.append((f"{replicas} generators" if replicas > 1 else "1 generator again", time.time()))
            status = await run.status()
            reached = int(status.version.step) if status else 0
            await run.reach_update(reached + updates, READY_TIMEOUT_S + 30 * updates)
            if replicas > 1:
                sampled = await _tokens_by_replica(run)
        ends, stale = await _updates(run)
    gaps = [later - earlier for earlier, later in itertools.pairwise(ends)]
    _show(phases, ends[1:], gaps)
    figures = {
        "engine": engine,
        "updates": len(ends),
        "median_gap_s": report.rounded(statistics.median(gaps)),
        "longest_gap_s": report.rounded(max(gaps)),
        "longest_to_median": report.rounded(max(gaps) / statistics.median(gaps)),
        "tokens_by_replica": sampled,
        "staleness_mean": report.rounded(statistics.fmean(stale)),
    }
    missed = []
    if max(gaps) > LONGEST_BAR * statistics.median(gaps):
        missed.append(f"an update took {figures['longest_to_median']} times the median")
    if len(sampled) < 3 or min(sampled.values()) == 0:
        missed.append("a newcomer sampled nothing")
    return {**figures, "missed": missed}


def _show(phases: Sequence[tuple[str, float]], ends: Sequence[float], gaps: Sequence[float]) -> None:
    """A row for each phase: its updates, and the time from one to the next."""
    starts = [start for _, start in phases]
    rows = []
    for (name, start), end in zip(phases, [*starts[1:], float("inf")], strict=True):
        here = [gap for at, gap in zip(ends, gaps, strict=True) if start <= at < end]
        row = (f"{statistics.median(here):.1f}", f"{max(here):.1f}") if here else ("-", "-")
        rows.append((name, str(len(here)), *row))
    Console().print(report.figures_table("From update to update", ("phase", "updates", "median s", "longest s"), rows))


async def _until_ready(run: LiveRun, replicas: int) -> None:
    async with asyncio.timeout(READY_TIMEOUT_S):
        while True:
            there = [p for p in (await run.get_run()).processes if p.name.startswith(GENERATION)]
            if len(there) == replicas and all(p.healthy and p.address for p in there):
                return
            await asyncio.sleep(0.2)


async def _tokens_by_replica(run: LiveRun) -> dict[str, int]:
    """Tokens that each generator has sampled. No application asks, so all of them were for training."""
    tokens: dict[str, int] = {}
    metadata = run.operator_metadata()
    for process in (await run.get_run()).processes:
        if not process.name.startswith(GENERATION):
            continue
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            answer = await stub.GetPolicy(generation_pb2.GetPolicyRequest(), timeout=CALL_TIMEOUT_S, metadata=metadata)
        tokens[process.name] = int(answer.tokens_sampled)
    return tokens


async def _updates(run: LiveRun) -> tuple[Sequence[float], Sequence[float]]:
    """When each update ended, seconds, and the mean staleness of its batch."""
    ends, stale = [], []
    async for answer in run.learner.WatchMetrics(learner_pb2.WatchMetricsRequest(no_follow=True), timeout=60):
        ends.append(answer.metrics.ended_at.ToNanoseconds() / 1e9)
        stale.append(answer.metrics.values["staleness_mean"])
    return ends, stale


def main(
    updates: Annotated[int, typer.Option(min=3, help="Updates of each phase.")] = 12,
    engine: Annotated[str, typer.Option(help="vllm, transformers or auto.")] = "auto",
) -> None:
    """Generators come and go while the learner trains."""
    with scratch_directory() as root:
        figures = asyncio.run(scale(root, updates, engine))
    report.finish(figures)
    if figures["missed"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
