"""`honed tokens`: makes the bearer tokens of a run whose services are started on several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: honed tokens secrets/tokens")(tokens)


def tokens(directory: Annotated[Path, typer.Argument(help="Where to make them. What is there stays.")]) -> None:
    """Make the bearer tokens of a run whose services are started one by one. `honed up` makes its own.

    Bring the directory to each machine, for example as a Kubernetes secret, and name it in the run file as security.tokens. A
    service needs table.json and the token of its own name; operator.token may do everything and is for people.
    """
    from honed.kit.tokens import ensure_local_tokens

    ensure_local_tokens(directory)
    typer.echo(str(directory))
