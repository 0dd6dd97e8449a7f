"""`honed wait`: returns when something is there that a service needs before it starts. An init container runs it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from honed.cli import output

if TYPE_CHECKING:  # the help is there at once
    from honed.config import RunSettings

POLL_S: Final = 2.0
SAID_S: Final = 30.0


class Awaited(StrEnum):
    """What can be waited for."""

    version = "version"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: honed wait version --run-file /etc/honed/run.yaml")(wait)


def wait(
    what: Annotated[Awaited, typer.Argument(help="What to wait for.")],
    run_file: Annotated[
        Path | None, typer.Option("--run-file", "-f", envvar="HONED_RUN_FILE", help="The run file (YAML). Unset: all defaults.")
    ] = None,
) -> None:
    """Wait until the policy store holds the run's first version, for as long as it takes.

    Generation and learner start from it, and end at once without it. Every half minute it says what is lacking.
    """
    from honed.settings_file import load_settings

    # As a container's first process it would not be ended by a signal that it does not handle.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    until_version(load_settings(run_file), output.note)


def until_version(
    settings: RunSettings,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Returns when the store holds a version. Blocks.

    Args:
        settings: the run's.
        say: is told what is lacking, at once and then every `SAID_S`.
        clock: gives seconds.
        sleep: waits.
    """
    from honed.artifacts.store import PolicyStore
    from honed.kit.errors import HonedError, may_pass

    due, lacking = (
        clock(),
        f"run {settings.run!r} has no version in {settings.policy_url} yet: its pretraining job publishes one",
    )
    store = PolicyStore(settings.policy_url, settings.run)
    while True:
        reason = lacking
        try:
            if store.latest() is not None:
                return
        except (HonedError, OSError) as error:
            if not may_pass(error):
                raise
            reason = str(error)
        if clock() >= due:
            say(f"honed: waiting: {reason}")
            due = clock() + SAID_S
        sleep(POLL_S)
