"""The live view of a run: its phase and progress, the loop's figures, its processes and what is wrong; all of it by RPC."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from honed.cli.output import printable
from honed.config import RunSettings
from honed.runtime import internal_channel
from honed.v1 import conductor_pb2, conductor_pb2_grpc, learner_pb2, learner_pb2_grpc

REFRESH_S = 0.5
PLAIN_EVERY_S = 5.0
CALL_TIMEOUT_S = 5.0
WATCH_TIMEOUT_S = 300.0
_TITLES = {
    conductor_pb2.RUN_PHASE_STARTING: "Starting",
    conductor_pb2.RUN_PHASE_PRETRAIN: "Language model",
    conductor_pb2.RUN_PHASE_REWARD_MODEL: "Reward model",
    conductor_pb2.RUN_PHASE_PPO: "Online loop",
    conductor_pb2.RUN_PHASE_FINISHED: "Finished",
    conductor_pb2.RUN_PHASE_STOPPED: "Stopped",
    conductor_pb2.RUN_PHASE_FAILED: "Failed",
}
_FIGURES = {
    "score_mean": ("score", "{:+.3f}"),
    "kl": ("KL", "{:.2f} nats"),
    "loss": ("loss", "{:.3f}"),
    "accuracy": ("pairs in order", "{:.2f}"),
    "entropy": ("entropy", "{:.2f}"),
    "staleness_max": ("staleness", "{:.0f} at most"),
}


@dataclass
class View:
    """What the services said last."""

    run: conductor_pb2.Run | None = None
    learner: learner_pb2.GetStatusResponse | None = None
    last: learner_pb2.StepMetrics | None = None


@asynccontextmanager
async def showing(settings: RunSettings, console: Console) -> AsyncIterator[None]:
    """Shows the run as long as the block runs: a live table on a terminal, a line now and then elsewhere."""
    view = View()
    async with (
        internal_channel(settings, settings.conductor.target) as conductor,
        internal_channel(settings, settings.learner.target) as learner,
    ):
        tasks = [
            asyncio.create_task(_poll(view, conductor, learner)),
            asyncio.create_task(_follow(view, learner)),
            asyncio.create_task(_show(view, console)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _poll(view: View, conductor: grpc.aio.Channel, learner: grpc.aio.Channel) -> None:
    run_stub = conductor_pb2_grpc.ConductorServiceStub(conductor)
    learner_stub = learner_pb2_grpc.LearnerServiceStub(learner)
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            view.run = (await run_stub.GetRun(conductor_pb2.GetRunRequest(), timeout=CALL_TIMEOUT_S)).run
        if view.run is not None and view.run.phase >= conductor_pb2.RUN_PHASE_PPO:
            with contextlib.suppress(grpc.aio.AioRpcError):
                view.learner = await learner_stub.GetStatus(learner_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
        await asyncio.sleep(REFRESH_S)


async def _follow(view: View, learner: grpc.aio.Channel) -> None:
    """Follows the learner's metrics through its restarts."""
    stub = learner_pb2_grpc.LearnerServiceStub(learner)
    while True:
        if view.learner is not None:
            request = learner_pb2.WatchMetricsRequest(from_step=max(1, view.learner.version.step))
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for answer in stub.WatchMetrics(request, timeout=WATCH_TIMEOUT_S):
                    view.last = answer.metrics
        await asyncio.sleep(REFRESH_S)


async def _show(view: View, console: Console) -> None:
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            while True:
                if view.run is not None:
                    live.update(render(view.run, view.learner, view.last))
                await asyncio.sleep(REFRESH_S)
    shown = ""
    while True:
        if view.run is not None and (line := plain_line(view.run, view.last)) != shown:
            console.print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False)
            shown = line
            await asyncio.sleep(PLAIN_EVERY_S)
        else:
            await asyncio.sleep(REFRESH_S)


def plain_line(run: conductor_pb2.Run, last: learner_pb2.StepMetrics | None) -> str:
    """The run in one line, for logs."""
    parts = [_TITLES.get(run.phase, "?"), run.doing]
    if run.phase in (conductor_pb2.RUN_PHASE_PRETRAIN, conductor_pb2.RUN_PHASE_REWARD_MODEL):
        parts.append(f"{run.phase_progress:.0%}")
    parts += [f"{name}={value:.4g}" for name, value in sorted(run.figures.items())]
    if last is not None:
        parts += [f"update {last.step}/{run.target_steps or '∞'}", *(f"{k} {v}" for k, v in _metrics(last).items())]
    parts += [f"ALARM: {alarm}" for alarm in run.alarms]
    return printable(" | ".join(parts)).replace("\n", " ")


def render(
    run: conductor_pb2.Run, learner: learner_pb2.GetStatusResponse | None, last: learner_pb2.StepMetrics | None
) -> RenderableType:
    """The run as a table with a progress bar."""
    head = Text.assemble((_TITLES.get(run.phase, "?"), "bold"), "  ", printable(run.doing))
    lines: list[RenderableType] = [head, ProgressBar(total=1.0, completed=run.phase_progress, width=60)]
    lines += [Text(f"! {printable(alarm)}", style="bold red") for alarm in run.alarms]
    if run.figures:
        lines.append(Text("  ".join(f"{name} {value:.4g}" for name, value in sorted(run.figures.items()))))
    if last is not None:
        table = Table.grid(padding=(0, 3))
        table.add_row("update", f"{last.step} of {run.target_steps or 'no end'}")
        for name, value in {**_metrics(last), **_learner(learner), **_queue(run)}.items():
            table.add_row(name, value)
        lines.append(table)
    processes = Table("process", "ready", "restarts", "version", "last exit", box=None, header_style="dim")
    for process in run.processes:
        ready = "yes" if process.healthy else "no"
        processes.add_row(process.name, ready, str(process.restarts), process.version, process.last_exit)
    return Group(*lines, processes)


def _metrics(last: learner_pb2.StepMetrics) -> dict[str, str]:
    values = last.values
    found = {title: form.format(values[name]) for name, (title, form) in _FIGURES.items() if name in values}
    if "tokens" in values and values.get("seconds"):
        found["speed"] = f"{values['tokens'] / values['seconds']:.0f} tokens/s"
    return found


def _learner(learner: learner_pb2.GetStatusResponse | None) -> dict[str, str]:
    if learner is None:
        return {}
    served = f"{learner.served_version.fence}.{learner.served_version.step}" if learner.HasField("served_version") else "-"
    return {"versions pushed": str(learner.versions_pushed), "serving": served}


def _queue(run: conductor_pb2.Run) -> dict[str, str]:
    return {"queue": ", ".join(f"{count} {stage}" for stage, count in sorted(run.queue_depth.items())) or "empty"}
