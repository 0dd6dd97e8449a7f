"""`honed wait`: holds a start up until what it needs is there, and says what that is."""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from honed.cli import output

_POLL_S = 2.0
_SAY_S = 60.0


class Thing(StrEnum):
    """What can be waited for."""

    version = "version"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: honed wait version --run-file /etc/honed/run.yaml")(wait)


def wait(
    thing: Annotated[Thing, typer.Argument(help="What to wait for: a version of the policy that can be served.")],
    run_file: Annotated[
        Path | None, typer.Option("--run-file", "-f", envvar="HONED_RUN_FILE", help="The run file (YAML). Unset: all defaults.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait at most.")] = 86_400.0,
) -> None:
    """Wait until the policy store holds a version that can be served. What a container does before a service that needs one.

    Exit status 75 when the time is up.
    """
    from honed.artifacts.store import PolicyStore
    from honed.kit.errors import HonedError, may_pass
    from honed.settings_file import load_settings

    settings = load_settings(run_file)
    store = PolicyStore(settings.policy_url, settings.run)
    end, said = time.monotonic() + timeout, -_SAY_S
    while True:
        reason = (
            f"no {thing.value} of run {settings.run!r} in {settings.policy_url} yet: the pretraining job publishes the first"
        )
        try:
            if versions := store.servable():
                output.note(f"version {versions[0]} of run {settings.run!r} is there")
                return
        except (HonedError, OSError) as error:
            if not may_pass(error):
                raise
            reason = f"{settings.policy_url} does not answer ({error})"
        if time.monotonic() >= end:
            output.note(f"honed: {reason}; waited {timeout:g} s")
            raise typer.Exit(os.EX_TEMPFAIL)
        if time.monotonic() - said >= _SAY_S:
            output.note(f"waiting: {reason}")
            said = time.monotonic()
        time.sleep(_POLL_S)
