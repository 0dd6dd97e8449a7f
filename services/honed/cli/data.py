"""`honed data`: what runs learn from: data that honed makes, and responses of the live policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from honed.cli import output
from honed.cli.best_of import best_of
from honed.cli.connection import check_no_cluster


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(
        no_args_is_help=True, help="What runs learn from: data that honed makes, and the best of the policy's own."
    )
    group.command(epilog="Example: honed data fetch --to /data/honed")(fetch)
    group.command(epilog="Example: honed data prepare --to /data, or honed data prepare sums --to /data")(prepare)
    group.command(
        "best-of",
        epilog="Example: honed data best-of prompts.jsonl --out answers.jsonl --comparisons pairs.jsonl --candidates 16",
    )(best_of)
    app.add_typer(group, name="data")


def fetch(
    to: Annotated[Path | None, typer.Option("--to", help="Directory. Unset: where the demo looks.")] = None,
) -> None:
    """Download the human ratings, check their digest, and print where they are. What is there is only checked."""
    from honed.demo.data import fetch as dataset

    check_no_cluster("data fetch")
    directory = to if to is not None else dataset.default_directory()
    output.note(f"fetching {dataset.HUMAN_RATINGS.requirement} into {directory}")
    typer.echo(str(dataset.fetch(directory)))


def prepare(
    name: Annotated[str, typer.Argument(help="Which, as `data.made` of a run file names it.")] = "ratings",
    *,
    to: Annotated[Path, typer.Option("--to", help="Directory. What is there stays.")],
    seed: Annotated[int, typer.Option(help="Of the split, and of which comparisons are drawn.")] = 1,
) -> None:
    """Write the files of data that honed makes: texts, prompts, judgements, and what is held out, each as JSON lines.

    Prints the `data` section that names them in a run file. A run file with `data: {made: NAME}` has all of this done by
    `honed up`. Without a name it is the default run's data.
    """
    import yaml

    from honed.recipes.made.base import find_made

    check_no_cluster("data prepare")
    data = find_made(name)
    output.note(f"writing the files of {name} into {to}")
    data.write(to, seed)
    section = data.files(to).model_dump(mode="json", exclude_defaults=True)
    typer.echo(yaml.safe_dump({"data": section}, sort_keys=False), nl=False)
