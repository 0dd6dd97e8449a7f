"""What `learner.own_cores` gives training, and what it takes from people who are served meanwhile.

Method. One run, as `honed up` starts it, that trains without end on a small model. Windows in turns: in one, everything but the
learner and `honed up` itself is bound to the cores that `learner.own_cores` leaves, as `honed up` would bind it; in the next,
all share all cores again. Two applications ask for a response after another all the time. `ratio` is updates a second, bound
over shared, the median of the pairs; `latency_ratio` the same of the median time of a response of 24 tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from honed.conductor.cores import cores_beside
from honed.v1 import common_pb2, generation_pb2, learner_pb2
from loadtest import report
from loadtest.live_run import LiveRun, live_run, run_tree
from loadtest.material import make_model
from loadtest.resources import descendants
from loadtest.scratch import scratch_directory

_SETTLE_S: Final = 0.5
_CALL_TIMEOUT_S: Final = 30.0


@dataclass
class Window:
    """A time in which nothing changed, seconds of the clock, and how long each response took in it."""

    begin: float
    end: float = 0.0
    latencies: list[float] = field(default_factory=list)


def updates_per_second(ended: Sequence[float], window: Window) -> float:
    """From the first update's end in the window to the last one's.

    Raises:
        ValueError: Fewer than two updates ended in it.
    """
    inside = [at for at in sorted(ended) if window.begin <= at <= window.end]
    if len(inside) < 2:
        raise ValueError(f"a window of {window.end - window.begin:.1f} s held {len(inside)} updates: make --seconds longer")
    return (len(inside) - 1) / (inside[-1] - inside[0])


def bind_beside_the_learner(up: int, cores: Sequence[int]) -> None:
    """Binds each thread of what `honed up`, a process of that id, has started, but for the learner's."""
    for pid in set(descendants(up)) - {up}:
        with contextlib.suppress(OSError):  # it has ended
            if b"\0serve\0learner\0" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setaffinity(int(thread), cores)


async def measure(root: Path, engine: str, own: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Runs the windows, and returns the figures."""
    everywhere, beside = tuple(sorted(os.sched_getaffinity(0))), cores_beside(own)
    tree = run_tree(
        root, generation={"engine": engine}, learner={"epochs": 4, "threads": own, "overlap_push": True, "checkpoint_every": 10}
    )
    windows: list[Window] = []
    async with live_run(root, tree) as run, asyncio.TaskGroup() as group:
        asking = [group.create_task(_ask(run, windows, seed)) for seed in (1, 2)]
        with report.progress() as bar:
            for number in bar.track(range(2 * rounds), description="windows"):
                bound = number % 4 in (1, 2)  # shared, bound, bound, shared: a drift of the machine favours neither
                await asyncio.to_thread(bind_beside_the_learner, run.process.pid, beside if bound else everywhere)
                await asyncio.sleep(_SETTLE_S)
                windows.append(Window(time.time()))
                await asyncio.sleep(seconds)
                windows[-1].end = time.time()
        for task in asking:
            task.cancel()
        ended = [
            answer.metrics.ended_at.ToNanoseconds() / 1e9
            async for answer in run.learner.WatchMetrics(learner_pb2.WatchMetricsRequest(no_follow=True), timeout=60)
        ]
    pairs = [
        (a, b) if number % 2 == 0 else (b, a) for number, (a, b) in enumerate(zip(windows[::2], windows[1::2], strict=True))
    ]
    rates = [(updates_per_second(ended, a), updates_per_second(ended, b)) for a, b in pairs]
    if not all(window.latencies for window in windows):
        raise ValueError(f"a window of {seconds:g} s held no response: make --seconds longer")
    waits = [(statistics.median(a.latencies), statistics.median(b.latencies)) for a, b in pairs]
    report.show(report.figures_table(
        "training and serving, cores shared and of its own",
        ("pair", "shared updates/s", "own updates/s", "ratio", "shared ms", "own ms", "ratio"),
        [
            (str(n), f"{a:.2f}", f"{b:.2f}", f"{b / a:.3f}", f"{c * 1e3:.0f}", f"{d * 1e3:.0f}", f"{d / c:.3f}")
            for n, ((a, b), (c, d)) in enumerate(zip(rates, waits, strict=True), 1)
        ],
    ))  # fmt: skip
    return {
        "ratio": report.rounded(report.median_ratio(rates)),
        "latency_ratio": report.rounded(report.median_ratio(waits)),
        "updates_per_second": [report.rounded(statistics.median(side)) for side in zip(*rates, strict=True)],
        "latency_ms": [report.rounded(1e3 * statistics.median(side)) for side in zip(*waits, strict=True)],
        "responses": sum(len(window.latencies) for window in windows),
        "own_cores": own,
        "cores": len(everywhere),
        "engine": engine,
    }


async def _ask(run: LiveRun, windows: Sequence[Window], seed: int) -> None:
    request = generation_pb2.GenerateRequest(
        prompt=generation_pb2.Prompt(text="the quiet street was"),
        sampling=common_pb2.SamplingParams(max_tokens=24, fixed_length=True, seed=seed),
    )
    while True:
        asked = time.time()
        await run.generation.Generate(request, timeout=_CALL_TIMEOUT_S)
        if windows and windows[-1].begin <= asked and not windows[-1].end:
            windows[-1].latencies.append(time.time() - asked)


def main(
    own: Annotated[int, typer.Option(min=1, help="The learner's cores and compute threads.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of windows.")] = 8,
    seconds: Annotated[float, typer.Option(min=1, help="Of a window.")] = 5.0,
    width: Annotated[int, typer.Option(min=32, help="Of the random model's layers.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Of the random model.")] = 2,
    engine: Annotated[str, typer.Option(help="vllm, transformers or auto.")] = "auto",
) -> None:
    """Measures what cores of its own give the learner, and prints both sides."""
    with scratch_directory() as root:
        make_model(root / "model", width=width, layers=layers)
        report.finish(asyncio.run(measure(root, engine, own, rounds, seconds)))


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
