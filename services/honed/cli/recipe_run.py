"""`honed recipes run`: a recipe on the human ratings, from the data to its figures."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from rich.console import Console
from rich.table import Table

from honed.cli.display import showing
from honed.conductor.local import local_run
from honed.conductor.run import Run
from honed.conductor.summary import pushes_of, updates_of, write_summary
from honed.config import RunSettings
from honed.demo import measures
from honed.demo.judge import RidgeJudge
from honed.demo.material import SOURCE, DemoData, demo_files, write_demo_files
from honed.demo.sums import sum_files, write_sum_files
from honed.kit.errors import FailedPrecondition
from honed.kit.log import configure_logging, log_to
from honed.recipes.catalogue import find_recipe
from honed.settings_file import recipe_settings
from honed.v1 import learner_pb2


@dataclass(frozen=True)
class RecipeFigures:
    """What a recipe made of the policy.

    Attributes:
        recipe: Its name.
        seed: Of the run.
        measured_by: What `before` and `after` are: `judge`, the mean rating of the held-out continuations by a judge that
            nothing trains on, in the raters' unit; or `reward`, their mean score by the run's own rule.
        before: Of the base policy.
        after: Of the trained one.
        kl_nats: Of the trained policy's continuations to the base policy, nats a response.
        distinct2_ratio: Distinct word pairs after, as a share of those before; None for a rule's short answers.
        updates: Of the learner.
        examples: Episodes, pairs or labelled responses that were trained on.
        versions_pushed: Into the running generator.
        seconds: From the data to the last measure.
        seconds_training: Of the loop alone.
    """

    recipe: str
    seed: int
    measured_by: Literal["judge", "reward"]
    before: float
    after: float
    kl_nats: float
    distinct2_ratio: float | None
    updates: int
    examples: int
    versions_pushed: int
    seconds: float
    seconds_training: float


def recipe_run_settings(name: str, directory: Path, seed: int | None) -> RunSettings:
    """A recipe's settings in a directory.

    Raises:
        NotFound: There is no such recipe.
        SettingsError: The environment overrides it with something wrong.
    """
    settings = recipe_settings(None, find_recipe(name).name)
    directory = directory.absolute()
    files = sum_files if _asks_for_sums(settings) else demo_files
    changed = {"directory": directory, "data": files(directory / "data")}
    return settings.model_copy(update={**changed, **({} if seed is None else {"seed": seed})})


async def run_recipe(name: str, settings: RunSettings, *, keep: bool, fresh: bool) -> None:
    """Runs a recipe, prints its figures and writes them with the report.

    Raises:
        FailedPrecondition: The run was stopped before its end.
        HonedError: The run failed.
    """
    started = time.monotonic()
    configure_logging("conductor", "ERROR")
    console = Console()
    async with local_run(settings, fresh=fresh, expendable=(SOURCE,)) as run:
        log_to(run.workspace.conductor_log)
        write = write_sum_files if _asks_for_sums(settings) else write_demo_files
        data = await asyncio.to_thread(write, run.workspace.root / "data", settings.seed)
        async with showing(run.settings, console):
            await run.execute(end_on_failure=True)
        if run.stopping.is_set():
            raise FailedPrecondition(f"it was stopped before its end; `honed recipes run {name} --resume` goes on")
        console.print("Measuring …")
        updates, pushes = await updates_of(run), await pushes_of(run)
        figures = await asyncio.to_thread(_figures, name, run, data, updates, pushes, started)
        await asyncio.to_thread(_write, run.workspace.recipe_json, figures)
        await write_summary(run)
        console.print(_table(figures))
        console.print(f"Report: {run.workspace.report_html}")
        if keep:
            await run.stand_by()


def _figures(
    name: str,
    run: Run,
    data: DemoData | None,
    updates: list[learner_pb2.StepMetrics],
    pushes: list[learner_pb2.Push],
    started: float,
) -> RecipeFigures:
    evaluation = run.evaluation
    if not updates or not evaluation.trained:
        raise FailedPrecondition(evaluation.problem or "nothing was trained")
    before, after = evaluation.base, evaluation.trained
    if data is None:
        if not evaluation.rewards_before or not evaluation.rewards_after:
            raise FailedPrecondition(evaluation.problem or "the continuations have no rewards")
        measured = fmean(evaluation.rewards_before), fmean(evaluation.rewards_after)
    else:
        judge = RidgeJudge.train(data.split.judge)
        measured = measures.judged(judge, before), measures.judged(judge, after)
    return RecipeFigures(
        recipe=name,
        seed=run.settings.seed,
        measured_by="reward" if data is None else "judge",
        before=measured[0],
        after=measured[1],
        kl_nats=measures.kl_to_base(run.workspace.base_model, after, run.settings.conductor.temperature),
        distinct2_ratio=None if data is None else measures.distinct2_ratio(before, after),
        updates=updates[-1].step,
        examples=round(sum(update.values.get(kind, 0.0) for update in updates for kind in ("episodes", "pairs", "responses"))),
        versions_pushed=sum(push.committed > 0 and not push.failures for push in pushes),
        seconds=time.monotonic() - started,
        seconds_training=(run.state.loop_ended_at or 0.0) - (run.state.loop_started_at or 0.0),
    )


def _asks_for_sums(settings: RunSettings) -> bool:
    """Whether a recipe's reward compares answers with references, which human ratings do not have."""
    return any(scorer.kind == "function" and scorer.source == "exact_match" for scorer in settings.reward.scorers)


def _write(path: Path, figures: RecipeFigures) -> None:
    path.write_text(json.dumps(asdict(figures), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _table(figures: RecipeFigures) -> Table:
    table = Table("figure", "value", title=f"What the recipe {figures.recipe} changed")
    for name, value in asdict(figures).items():
        if value is not None:
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    return table
