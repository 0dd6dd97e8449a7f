"""`honed demo`: the default run from the data to the report."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from honed.cli.display import showing
from honed.conductor.local import local_run
from honed.conductor.run import Run
from honed.conductor.sampling import prompts_of, training_sampling
from honed.conductor.summary import pushes_of, updates_of
from honed.config import RunSettings
from honed.demo import measures
from honed.demo.application import Application
from honed.demo.data.split import Split
from honed.demo.judge import RidgeJudge
from honed.demo.material import SOURCE, rating_split
from honed.demo.report import write_report
from honed.kit.errors import FailedPrecondition
from honed.kit.log import configure_logging, log_to
from honed.kit.tokens import read_token
from honed.recipes.catalogue import DEMO
from honed.recipes.made.base import make_data
from honed.report.measures import pauses_ms, percentile
from honed.settings_file import recipe_settings
from honed.v1 import learner_pb2


def demo_settings(run_file: Path | None, directory: Path) -> RunSettings:
    """The demo's settings: the recipe that the package carries, or a file of the user's, in `directory`.

    Raises:
        SettingsError: the file is wrong.
    """
    over = {"directory": directory.absolute(), "data": {"made": "ratings"}}
    return recipe_settings(run_file, DEMO, over=over)


async def run_demo(settings: RunSettings, *, keep: bool, fresh: bool) -> None:
    """Runs the demo and writes the report.

    Raises:
        FailedPrecondition: a bar was missed; the report is written all the same.
        HonedError: the run failed.
    """
    started = time.monotonic()
    configure_logging("conductor", "ERROR")
    console = Console()
    async with local_run(settings, fresh=fresh, expendable=(SOURCE,)) as run:
        log_to(run.workspace.conductor_log)
        if run.kept is not None:
            console.print(f"The directory held judgements of people; they are kept in {run.kept}", highlight=False)
        await asyncio.to_thread(make_data, run.settings)
        session = _Session(run, await asyncio.to_thread(rating_split, settings.seed))
        async with showing(run.settings, console):
            try:
                await run.execute(before_loop=session.before_loop, end_on_failure=True)
                await session.after_loop()
            finally:
                await session.close()
        if run.stopping.is_set():
            raise FailedPrecondition("the demo was stopped before its end; `honed demo --resume` goes on")
        console.print("Measuring …")
        updates, pushes = await updates_of(run, with_rollouts=True), await pushes_of(run)
        figures = await asyncio.to_thread(session.figures, started, updates, pushes)
        await asyncio.to_thread(session.report, figures, updates, pushes)
        console.print(_summary(figures))
        if slow := figures.slow():
            console.print(f"[yellow]Slower than its bar:[/yellow] {slow}. A busy machine shows here first.")
        console.print(f"Report: {run.workspace.report_html}")
        if keep:
            console.print(
                f"Everything goes on serving; try `honed generate --run {run.workspace.root} 'the film is'`. Ctrl-C ends it."
            )
            await run.stand_by()
    if missed := figures.missed():
        raise FailedPrecondition("bars missed: " + "; ".join(missed))


@dataclass
class _Busy:
    """The generator's busy seconds at the start and at the end of the loop."""

    start: float = 0.0
    end: float = 0.0


class _Session:
    """What the demo does beside the run: an application's traffic during the loop, and the figures at the end."""

    def __init__(self, run: Run, ratings: Split) -> None:
        self._run, self._ratings = run, ratings
        self._application: Application | None = None
        self._traffic: asyncio.Task[None] | None = None
        self._busy = _Busy()

    async def before_loop(self) -> None:
        settings = self._run.settings
        token = read_token(settings.tokens_directory / "application.token") if settings.security.authentication else None
        self._application = Application(self._run.fleet.target("generation"), token, training_sampling(settings))
        evaluation = settings.data.evaluation
        if evaluation.prompts is None:
            raise FailedPrecondition("data.evaluation.prompts is not set: the demo compares what the policy makes of them")
        prompts = await asyncio.to_thread(prompts_of, evaluation.prompts, evaluation.samples)
        self._busy.start = await self._application.busy_seconds()
        self._traffic = asyncio.ensure_future(self._application.keep_asking(prompts))

    async def after_loop(self) -> None:
        if self._application is not None and not self._run.stopping.is_set():
            self._busy.end = await self._application.busy_seconds()

    async def close(self) -> None:
        if self._traffic is not None:
            self._traffic.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._traffic
        if self._application is not None:
            await self._application.close()

    def figures(
        self, started: float, updates: list[learner_pb2.StepMetrics], pushes: list[learner_pb2.Push]
    ) -> measures.Figures:
        run, evaluation = self._run, self._run.evaluation
        if self._application is None or not updates or evaluation.agreement is None or not evaluation.trained:
            raise FailedPrecondition(evaluation.problem or "the demo's loop has not run")
        judge = RidgeJudge.train(self._ratings.judge)
        start, end = run.state.loop_started_at or 0.0, run.state.loop_ended_at or 0.0
        before, after = evaluation.base, evaluation.trained
        return measures.Figures(
            rm_agreement=evaluation.agreement.share,
            judge_before=measures.judged(judge, before),
            judge_after=measures.judged(judge, after),
            kl_mean_nats=measures.kl_to_base(run.workspace.base_model, after, run.settings.conductor.temperature),
            distinct2_ratio=measures.distinct2_ratio(before, after),
            versions_pushed=sum(push.committed > 0 and not push.failures for push in pushes),
            push_pause_p95_ms=percentile(pauses_ms(pushes), 0.95),
            requests_failed=self._application.traffic.failed,
            learner_busy=measures.busy_share(updates, start, end),
            generator_busy=(self._busy.end - self._busy.start) / (end - start),
            staleness_mean=fmean(update.values["staleness_mean"] for update in updates),
            staleness_max=int(max(update.values["staleness_max"] for update in updates)),
            rollouts_produced=run.state.stages["rollouts"].came_in,
            rollouts_trained=measures.trained_rollouts(updates),
            rollouts_dropped=measures.dropped_rollouts(run.state.stages),
            seconds_total=time.monotonic() - started,
        )

    def report(self, figures: measures.Figures, updates: list[learner_pb2.StepMetrics], pushes: list[learner_pb2.Push]) -> None:
        evaluation = self._run.evaluation
        write_report(self._run.workspace.root, figures, updates, pushes, evaluation.base, evaluation.trained)


def _summary(figures: measures.Figures) -> Table:
    table = Table("figure", "value", title="What the run changed")
    for name, value in figures.as_json().items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        table.add_row(name, text)
    return table
