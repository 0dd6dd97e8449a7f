"""`honed data`: the default run's human ratings as files of a run, and responses of the live policy to learn from."""

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
        no_args_is_help=True, help="What runs learn from: the default run's data, and the best of the policy's own."
    )
    group.command(epilog="Example: honed data fetch --to /data/honed")(fetch)
    group.command(epilog="Example: honed data prepare --to /data")(prepare)
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
    to: Annotated[Path, typer.Option("--to", help="Directory. What is there stays.")],
    seed: Annotated[int, typer.Option(help="Of the split, and of which comparisons are drawn.")] = 1,
) -> None:
    """Write the files of the default run: texts, prompts, comparisons, and what is held out, each as JSON lines.

    Prints the `data` section that names them in a run file. `honed demo` does all of this by itself.
    """
    import yaml

    from honed.demo.material import demo_files, write_demo_files

    check_no_cluster("data prepare")
    output.note(f"writing the default run's files into {to}")
    write_demo_files(to, seed)
    section = demo_files(to).model_dump(mode="json", exclude_defaults=True)
    typer.echo(yaml.safe_dump({"data": section}, sort_keys=False), nl=False)
