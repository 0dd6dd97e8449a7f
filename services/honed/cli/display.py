"""The live view of a run: its phase and progress, the loop's figures, and its processes."""

from __future__ import annotations

import asyncio
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from honed.conductor.run import Run
from honed.learner.ledger import StepRecord, read_steps
from honed.v1 import conductor_pb2

REFRESH_S = 0.5
PLAIN_EVERY_S = 5.0
_TITLES = {
    conductor_pb2.RUN_PHASE_STARTING: "Starting",
    conductor_pb2.RUN_PHASE_PRETRAIN: "Language model",
    conductor_pb2.RUN_PHASE_REWARD_MODEL: "Reward model",
    conductor_pb2.RUN_PHASE_PPO: "Online loop",
    conductor_pb2.RUN_PHASE_FINISHED: "Finished",
    conductor_pb2.RUN_PHASE_STOPPED: "Stopped",
    conductor_pb2.RUN_PHASE_FAILED: "Failed",
}


async def show(run: Run, console: Console) -> None:
    """Shows the run until cancelled: a live table on a terminal, a line now and then elsewhere."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            while True:
                live.update(render(run))
                await asyncio.sleep(REFRESH_S)
    shown = ""
    while True:
        line = plain_line(run)
        if line != shown:
            console.print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False)
            shown = line
        await asyncio.sleep(PLAIN_EVERY_S)


def plain_line(run: Run) -> str:
    """The run in one line, for logs."""
    state = run.state
    parts = [_TITLES.get(state.phase, "?"), state.doing]
    if progress := run.job_progress():
        parts.append(f"{progress.done:.0%} {progress.doing}")
        parts += [f"{name}={value:.4g}" for name, value in progress.figures.items()]
    if last := _last_step(run):
        parts += [f"step {last.step}/{run.settings.learner.steps}", *(f"{k} {v}" for k, v in _figures(run, last).items())]
    return " | ".join(parts)


def render(run: Run) -> RenderableType:
    """The run as a table with a progress bar."""
    state, progress, last = run.state, run.job_progress(), _last_step(run)
    head = Text.assemble((_TITLES.get(state.phase, "?"), "bold"), "  ", state.doing)
    share = (
        last.step / run.settings.learner.steps if last and run.settings.learner.steps else progress.done if progress else 0.0
    )
    lines: list[RenderableType] = [head, ProgressBar(total=1.0, completed=share, width=60)]
    if progress is not None:
        lines.append(Text(f"{progress.doing}  " + "  ".join(f"{k} {v:.4g}" for k, v in progress.figures.items())))
    if last is not None:
        table = Table.grid(padding=(0, 3))
        for name, value in _figures(run, last).items():
            table.add_row(name, value)
        lines.append(table)
    processes = Table("process", "ready", "restarts", "last exit", box=None, header_style="dim")
    for process in run.launcher.states():
        processes.add_row(process.name, "yes" if process.ready else "no", str(process.restarts), process.last_exit)
    return Group(*lines, processes)


def _figures(run: Run, last: StepRecord) -> dict[str, str]:
    values, learner, depths = last.values, run.state.learner, run.state.depths
    figures = {
        "score": f"{values['score_mean']:+.3f}",
        "KL": f"{values['kl']:.2f} nats",
        "entropy": f"{values['entropy']:.2f}",
        "staleness": f"{values['staleness_max']:.0f} at most",
        "update": f"{values['tokens'] / max(values['seconds'], 1e-9):.0f} tokens/s",
    }
    if learner is not None:
        figures["versions pushed"] = str(learner.versions_pushed)
        figures["serving"] = f"{learner.served_version.fence}.{learner.served_version.step}"
    if depths is not None:
        figures["queue"] = f"{depths.prompts} prompts, {depths.rollouts} rollouts, {depths.scored} scored"
    return figures


def _last_step(run: Run) -> StepRecord | None:
    if run.state.loop_started_at is None:
        return None
    steps = read_steps(run.place.learner)
    return steps[-1] if steps else None
