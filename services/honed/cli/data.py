"""`honed data fetch`: brings the default run's human ratings to this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from honed.cli import output


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(no_args_is_help=True, help="The default run's data.")
    group.command(epilog="Example: honed data fetch --to /data/honed")(fetch)
    app.add_typer(group, name="data")


def fetch(
    to: Annotated[Path | None, typer.Option("--to", help="Directory. Unset: where the demo looks.")] = None,
) -> None:
    """Download the human ratings, check their digest, and print where they are. What is there is only checked."""
    from honed.demo.data import fetch as dataset

    directory = to if to is not None else dataset.default_directory()
    output.note(f"fetching {dataset.HUMAN_RATINGS.requirement} into {directory}")
    typer.echo(str(dataset.fetch(directory)))
