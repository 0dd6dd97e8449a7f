"""`honed recipes`: run files that reproduce a method, to read, to begin from, and to run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from honed.cli import output
from honed.cli.recipes_bench import bench

if TYPE_CHECKING:
    from honed.conductor.run import Run
    from honed.config import RunSettings
    from honed.recipes.figures import RecipeFigures

Name = Annotated[str, typer.Argument(help="The recipe's name; `honed recipes list` shows them.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(no_args_is_help=True, help="Run files that reproduce a method, each on data of its own.")
    group.command("list")(list_recipes)
    group.command(epilog="Example: honed recipes show dpo > mine.yaml")(show)
    group.command(epilog="Example: honed recipes run dpo --directory out/dpo")(run)
    group.command(epilog="Example: honed recipes bench dpo grpo --seeds 3 --table docs/recipes.md")(bench)
    app.add_typer(group, name="recipes")


def list_recipes(json: output.JsonOption = False) -> None:
    """Show which recipes there are."""
    from honed.recipes.catalogue import recipes

    if json:
        output.show_json([{"name": recipe.name, "title": recipe.title} for recipe in recipes()])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "what it is", box=None)
    for recipe in recipes():
        table.add_row(recipe.name, recipe.title)
    Console().print(table)


def show(name: Name) -> None:
    """Print a recipe's run file, with what it reproduces and where it differs."""
    from honed.recipes.catalogue import find_recipe

    typer.echo(find_recipe(name).text, nl=False)


def run(
    name: Name,
    directory: Annotated[Path | None, typer.Option(help="Where everything goes. Unset: out/NAME.")] = None,
    seed: Annotated[int | None, typer.Option(help="In place of the recipe's.", min=0)] = None,
    reuse: Annotated[
        Path | None, typer.Option(help="Directory that trained base and reward models are kept in, and taken from where equal.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Something other than the recipe's, such as learner.max_staleness=0; may be repeated."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything serving at the end, until Ctrl-C.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Begin anew, or go on with what is there. Judgements of people are kept.")
    ] = True,
) -> None:
    """Run a recipe, and report what it made of the policy.

    A recipe makes the data that its run file names as `data.made`, and is measured on what is held out of it.

    Needs no GPU and some minutes on two cores. The settings are the recipe's; --set and HONED_<SECTION>__<KEY> override them.
    Writes recipe.json beside the report.
    """
    import asyncio
    import os

    from honed.kit.log import configure_logging
    from honed.recipes.catalogue import find_recipe

    name = find_recipe(name).name  # before what takes seconds to import
    from honed.cli.check import refuse_errors
    from honed.recipes.running import recipe_run_settings
    from honed.telemetry import traced

    settings = recipe_run_settings(name, directory or Path("out") / name, seed, reuse, changes or ())
    refuse_errors(settings)
    os.umask(0o077)  # texts of people are among what it writes
    configure_logging("conductor", "ERROR")
    with traced(settings, "conductor"):
        asyncio.run(_run(name, settings, keep=keep, fresh=fresh))


async def _run(name: str, settings: RunSettings, *, keep: bool, fresh: bool) -> None:
    from rich.table import Table

    from honed.cli.display import showing
    from honed.recipes.running import run_recipe

    console = output.console()

    async def report(run: Run, figures: RecipeFigures) -> None:
        table = Table("figure", "value", title=f"What the recipe {name} changed")
        for row in figures.rows():
            table.add_row(*row)
        console.print(table)
        console.print(f"Report: {run.workspace.report_html}")
        if keep:
            await run.stand_by()

    await run_recipe(name, settings, showing=lambda current: showing(current, console), fresh=fresh, then=report)
