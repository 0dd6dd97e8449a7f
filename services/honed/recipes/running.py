"""Runs one recipe, from the data to its figures."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final

from honed.artifacts.store import PolicyStore
from honed.conductor.local import local_run
from honed.conductor.run import Run
from honed.conductor.summary import pushes_of, updates_of, write_summary
from honed.config import RunSettings
from honed.demo.measures import distinct2_ratio, kl_to_base, perplexity
from honed.kit.errors import FailedPrecondition
from honed.kit.log import log_to
from honed.learner.jobs.reuse import reused_models
from honed.recipes.catalogue import find_recipe
from honed.recipes.changes import changed_tree
from honed.recipes.figures import RecipeFigures
from honed.recipes.made.base import Change, MadeData, Sampled, find_made, make_data
from honed.report.curves import CURVES
from honed.report.measures import best_of_kl
from honed.settings_file import recipe_settings
from honed.v1 import learner_pb2

_EXAMPLES: Final = ("episodes", "pairs", "responses")

Showing = Callable[[RunSettings], AbstractAsyncContextManager[None]]
"""Shows a run as long as the block is open."""


def recipe_run_settings(
    name: str, directory: Path, seed: int | None, reuse: Path | None = None, changes: Sequence[str] = ()
) -> RunSettings:
    """A recipe's settings in a directory.

    Args:
        name: The recipe's.
        directory: Of the run.
        seed: Of the run; None for the recipe's.
        reuse: Where trained models are shared; None: nowhere.
        changes: What is different from the recipe, each `learner.max_staleness=0`.

    Raises:
        NotFound: There is no such recipe.
        SettingsError: A change, or the environment, overrides it with something wrong.
    """
    over: dict[str, Any] = {**changed_tree(changes), "directory": directory.absolute()}
    if seed is not None:
        over["seed"] = seed
    if reuse is not None:
        over["reuse"] = reuse.absolute()
    return recipe_settings(None, find_recipe(name).name, over=over)


async def run_recipe(
    name: str, settings: RunSettings, *, showing: Showing, fresh: bool, then: Callable[[Run, RecipeFigures], Awaitable[None]]
) -> None:
    """Runs a recipe to its end, and writes its figures and the report into its directory.

    Args:
        name: The recipe's.
        settings: As `recipe_run_settings` gives them.
        showing: What shows the run.
        fresh: Whether to begin anew, and not to go on with what is there.
        then: Awaited with the run, which serves, and the figures.

    Raises:
        FailedPrecondition: The run was stopped before its end, or its data is none that honed makes.
        HonedError: The run failed.
    """
    started = time.monotonic()
    if settings.data.made is None:
        raise FailedPrecondition("data.made is not set: a recipe is measured on data that honed makes")
    data = find_made(settings.data.made)
    async with local_run(settings, fresh=fresh, expendable=data.sources) as run:
        log_to(run.workspace.conductor_log)
        await asyncio.to_thread(make_data, run.settings)
        async with showing(run.settings):
            await run.execute(end_on_failure=True)
        if run.stopping.is_set():
            raise FailedPrecondition(f"it was stopped before its end; `honed recipes run {name} --resume` goes on")
        online = run.settings.goes_through("online")
        updates, pushes = (await updates_of(run), await pushes_of(run)) if online else ([], [])
        figures = await asyncio.to_thread(_figures, name, run, data, updates, pushes, started)
        await asyncio.to_thread(figures.write, run.workspace.recipe_json)
        await write_summary(run)
        await then(run, figures)


def _figures(
    name: str,
    run: Run,
    data: MadeData,
    updates: Sequence[learner_pb2.StepMetrics],
    pushes: Sequence[learner_pb2.Push],
    started: float,
) -> RecipeFigures:
    evaluation = run.evaluation
    if not evaluation.trained or (run.settings.goes_through("online") and not updates):
        raise FailedPrecondition(evaluation.problem or "nothing was trained")
    before, after = evaluation.base, evaluation.trained
    change, *others = data.measure(
        Sampled(before, after, evaluation.rewards_before, evaluation.rewards_after), run.settings.seed
    )
    if updates and (texts := data.held_out_texts(run.settings.seed)):
        others.append(_perplexity(run, texts))
    return RecipeFigures(
        recipe=name,
        seed=run.settings.seed,
        figure=change.figure,
        before=change.before,
        after=change.after,
        others={other.figure: (other.before, other.after) for other in others},
        # The winners' own log ratio, and what choosing them costs: together the divergence of what is measured.
        kl_nats=kl_to_base(run.workspace.base_model, after, run.settings.conductor.temperature)
        + best_of_kl(run.settings.data.evaluation.best_of or 1),
        distinct2_ratio=distinct2_ratio(before, after) if data.prose else None,
        updates=updates[-1].step if updates else 0,
        examples=round(sum(_examples(update) for update in updates)),
        versions_pushed=sum(push.committed > 0 and not push.failures for push in pushes),
        seconds=time.monotonic() - started,
        seconds_training=(run.state.loop_ended_at or 0.0) - (run.state.loop_started_at or 0.0),
        reused=reused_models(run.workspace),
        curves=_curves(updates),
    )


def _examples(update: learner_pb2.StepMetrics) -> float:
    """What an update learned from; an algorithm that makes pairs of its episodes tells both."""
    return next((update.values[kind] for kind in _EXAMPLES if kind in update.values), 0.0)


def _perplexity(run: Run, texts: Sequence[str]) -> Change:
    """How much worse the last version knows texts that people wrote and nobody trained on."""
    store = PolicyStore(run.settings.policy_url, run.settings.run)
    directory = run.workspace.root / "measured"
    try:
        last = store.fetch(store.servable()[0], directory)
        return Change("perplexity of held-out texts", *(perplexity(each, texts) for each in (run.workspace.base_model, last)))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _curves(updates: Sequence[learner_pb2.StepMetrics]) -> Mapping[str, list[float]]:
    curves = {
        curve.metric: [float(update.values[curve.metric]) for update in updates if curve.metric in update.values]
        for curve in CURVES
    }
    return {name: values for name, values in curves.items() if values}
