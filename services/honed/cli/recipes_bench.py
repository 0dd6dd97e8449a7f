"""`honed recipes bench`: recipes over seeds, one after the other, and a table of what they made of the policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from honed.cli import output

if TYPE_CHECKING:
    from honed.recipes.bench.bench import Told
    from honed.recipes.bench.results import Result, Results, Task


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Recipes. None: all.", metavar="[NAME]...")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds of each, from 1 on.", min=1)] = 3,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Something other than the recipes', such as learner.max_staleness=0; may be repeated."),
    ] = None,
    directory: Annotated[Path, typer.Option(help="Where the runs, their results and the page go.")] = Path("out/bench"),
    kept: Annotated[
        Path | None,
        typer.Option("--results", help="Where result files lie, one of each recipe and seed. Default: DIRECTORY/results."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            help="A page in Markdown, such as docs/recipes.md: the table goes between its markers, of all recipes with results."
        ),
    ] = None,
    limit_minutes: Annotated[float, typer.Option(help="A run that takes longer is stopped, and has failed.", min=0.1)] = 30.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what has results, and train again what is shared.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be run, and run nothing.")] = False,
) -> None:
    """Run recipes over seeds, and show what each made of its policy.

    Goes on where it was: what has a result of the recipe as it is now is not run again. A recipe that fails is told in the
    table, and tried again by the next call. Recipes of one seed share the base and reward models that are made of the same; a
    run's time in the table is what it would have taken alone. Ctrl-C ends it; exit status 1 if a run failed.
    """
    import os

    from honed.recipes.bench.bench import run_bench, tasks
    from honed.recipes.bench.process import ProcessRunner, origin
    from honed.recipes.bench.results import Results
    from honed.recipes.bench.table import around_markers
    from honed.recipes.catalogue import find_recipe, recipes
    from honed.recipes.changes import changed_tree

    chosen = [find_recipe(name) for name in names] if names else recipes()
    changed_tree(changes or ())  # one that cannot be is told at once
    if table is not None:
        around_markers(table)  # a page that cannot take the table is told of before the runs, not after
    wanted = tasks(list(dict.fromkeys(chosen)), seeds, changes=changes or ())
    results = Results(kept or directory / "results")
    if dry_run:
        _show_plan(wanted, results, fresh=fresh)
        return
    os.umask(0o077)  # texts of people are among what the runs write
    if fresh:
        _forget(wanted, results, directory / "reuse")
    runner = ProcessRunner(directory / "runs", directory / "reuse", 60 * limit_minutes)
    _show_progress(run_bench(wanted, results, runner, origin()), runner.runs)
    found = _known(results, wanted)
    _write(found, directory / "recipes.html")
    if table is not None:
        _write_table(_known(results, tasks(recipes(), seeds, changes=changes or ())), table)
    if any(result.figures is None for result in found):
        raise typer.Exit(1)


def _show_plan(wanted: Sequence[Task], results: Results, *, fresh: bool) -> None:
    rows = [(task.recipe.name, str(task.seed), "run" if fresh or not results.done(task) else "done") for task in wanted]
    output.show(output.table(["recipe", "seed", ""], rows))


def _forget(wanted: Sequence[Task], results: Results, reuse: Path) -> None:
    import shutil

    for task in wanted:
        results.forget(task)
    shutil.rmtree(reuse, ignore_errors=True)


def _show_progress(told: Iterable[Told], runs: Path) -> None:
    """A bar over all runs on a terminal, and a line for each that has ended."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = output.console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None)
        for each in told:
            if each.result is None:
                progress.update(bar, description=each.task.label, total=each.of, completed=each.number - 1)
                console.print(f"{each.number} of {each.of}: {each.task.label}; its output goes to {runs / each.task.label}.log")
            else:
                progress.update(bar, completed=each.number)
                console.print(f"{each.number} of {each.of}: {each.task.label}: {_outcome(each.result)}")


def _outcome(result: Result) -> str:
    figures = result.figures
    if figures is None:
        return f"failed: {result.error}"
    return f"{figures.figure}: {figures.before:.3f} → {figures.after:.3f} in {figures.seconds:.0f} s"


def _known(results: Results, tasks: Sequence[Task]) -> list[Result]:
    return [result for task in tasks if (result := results.of(task)) is not None]


def _write(found: Sequence[Result], page: Path) -> None:
    from honed.recipes.bench.page import write_page
    from honed.recipes.bench.table import markdown, rows

    shown = rows(found)
    write_page(page, shown)
    typer.echo(markdown(shown), nl=False)
    output.note(f"the curves: {page}")


def _write_table(found: Sequence[Result], page: Path) -> None:
    from honed.recipes.bench.table import markdown, rows, write_between_markers

    write_between_markers(page, markdown(rows(found)))
