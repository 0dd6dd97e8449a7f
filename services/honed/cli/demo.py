"""`honed demo`: the default run from the data to the report."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from honed.artifacts.reward_models import TRAINED, RewardModelStore
from honed.cli.display import show
from honed.conductor.local import local_run
from honed.conductor.run import Run
from honed.config import RunSettings
from honed.demo import measures
from honed.demo.judge import RidgeJudge
from honed.demo.material import DemoData, demo_files, write_demo_files
from honed.demo.report import write_report
from honed.demo.sampling import Application, Continuation
from honed.kit.errors import FailedPrecondition
from honed.kit.jsonl import read_lines
from honed.kit.log import configure_logging
from honed.kit.tokens import read_token
from honed.learner.ledger import read_pushes, read_steps
from honed.settings_file import recipe_settings
from honed.v1 import common_pb2


def demo_settings(run_file: Path | None, directory: Path) -> RunSettings:
    """The demo's settings: the recipe that the package carries, or a file of the user's, in `directory`.

    Raises:
        SettingsError: the file is wrong.
    """
    settings = recipe_settings(run_file, "demo")
    directory = directory.absolute()
    return settings.model_copy(update={"directory": directory, "data": demo_files(directory / "data")})


async def run_demo(settings: RunSettings, *, keep: bool, fresh: bool) -> None:
    """Runs the demo and writes the report.

    Raises:
        FailedPrecondition: a bar was missed; the report is written all the same.
        HonedError: the run failed.
    """
    started = time.monotonic()
    configure_logging("conductor", "ERROR")
    console = Console()
    async with local_run(settings, fresh=fresh) as run:
        data = await asyncio.to_thread(write_demo_files, run.place.root / "data", settings.seed)
        session = _Session(run, data)
        display = asyncio.ensure_future(show(run, console))
        try:
            await run.execute(before_loop=session.before_loop)
            await session.after_loop()
        finally:
            display.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await display
            await session.close()
        if run.stopping.is_set():
            raise FailedPrecondition("the demo was stopped before its end; `honed demo --resume` goes on")
        console.print("Measuring …")
        figures = await asyncio.to_thread(session.figures, started)
        await asyncio.to_thread(session.report, figures)
        console.print(_summary(figures))
        if slow := figures.slow():
            console.print(f"[yellow]Slower than its bar:[/yellow] {slow}. A busy machine shows here first.")
        console.print(f"Report: {run.place.root / 'report.html'}")
        if keep:
            console.print(
                f"Everything goes on serving; try `honed generate --run {run.place.root} 'the film is'`. Ctrl-C ends it."
            )
            await run.stopping.wait()
    if missed := figures.missed():
        raise FailedPrecondition("bars missed: " + "; ".join(missed))


@dataclass
class _Busy:
    """The generator's busy seconds at the start and at the end of the loop."""

    start: float = 0.0
    end: float = 0.0


class _Session:
    """What the demo does beside the run: samples before and after, and an application's traffic in between."""

    def __init__(self, run: Run, data: DemoData) -> None:
        self._run, self._data = run, data
        self._application: Application | None = None
        self._traffic: asyncio.Task[None] | None = None
        self._before: list[Continuation] = []
        self._after: list[Continuation] = []
        self._busy = _Busy()

    async def before_loop(self) -> None:
        settings = self._run.settings
        token = read_token(settings.tokens_directory / "application.token") if settings.security.authentication else None
        mine = settings.conductor
        sampling = common_pb2.SamplingParams(
            max_tokens=mine.response_tokens, temperature=mine.temperature, fixed_length=mine.fixed_length
        )
        self._application = Application(settings.generation.target, token, sampling)
        prompts = self._prompts()
        self._before = await self._application.continuations(prompts)
        self._busy.start = await self._application.busy_seconds()
        self._traffic = asyncio.ensure_future(self._application.keep_asking(prompts))

    async def after_loop(self) -> None:
        if self._application is None or self._run.stopping.is_set():
            return
        self._busy.end = await self._application.busy_seconds()
        await self._end_traffic()
        self._after = await self._application.continuations(self._prompts())

    async def close(self) -> None:
        await self._end_traffic()
        if self._application is not None:
            await self._application.close()

    def figures(self, started: float) -> measures.Figures:
        run, place, data = self._run, self._run.place, self._data
        if self._application is None or run.state.learner is None:
            raise FailedPrecondition("the demo's loop has not run")
        steps, pushes = read_steps(place.learner), read_pushes(place.learner)
        judge = RidgeJudge.train(data.split.judge)
        seconds = (run.state.loop_ended_at or 0.0) - (run.state.loop_started_at or 0.0)
        return measures.Figures(
            rm_agreement=measures.reward_model_agreement(_reward_model(run), data.held_out_comparisons()),
            judge_before=measures.judged(judge, self._before),
            judge_after=measures.judged(judge, self._after),
            kl_mean_nats=measures.kl_to_base(place.base_model, self._after, run.settings.conductor.temperature),
            distinct2_ratio=measures.distinct2_ratio(self._before, self._after),
            versions_pushed=sum(push.succeeded for push in pushes),
            push_pause_p95_ms=measures.pause_p95_ms(pushes),
            requests_failed=self._application.traffic.failed,
            learner_busy=sum(step.values["seconds"] for step in steps) / seconds,
            generator_busy=(self._busy.end - self._busy.start) / seconds,
            staleness_max=int(max(step.values["staleness_max"] for step in steps)),
            rollouts_produced=run.state.books["rollouts"].came_in,
            rollouts_trained=measures.trained_rollouts(steps),
            rollouts_dropped=measures.dropped_rollouts(run.state.books),
            seconds_total=time.monotonic() - started,
        )

    def report(self, figures: measures.Figures) -> None:
        place = self._run.place
        steps, pushes = read_steps(place.learner), read_pushes(place.learner)
        write_report(place.root, figures, steps, pushes, self._before, self._after)

    def _prompts(self) -> list[str]:
        return [str(row["text"]) for _, row in read_lines(self._run.place.root / "data" / "evaluation.jsonl")]

    async def _end_traffic(self) -> None:
        if self._traffic is not None:
            self._traffic.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._traffic
            self._traffic = None


def _reward_model(run: Run) -> Path:
    """The reward model that the run trained first, which gave its rewards."""
    store = RewardModelStore(run.settings.policy_url, run.settings.run, TRAINED)
    return store.fetch(store.versions()[0], run.place.root / "models" / "reward")


def _summary(figures: measures.Figures) -> Table:
    table = Table("figure", "value", title="What the run changed")
    for name, value in figures.as_json().items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        table.add_row(name, text)
    return table
