"""`honed up`, `honed demo`, `honed serve` and `honed job`: what starts processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # the help is there at once
    from honed.config import RunSettings

RunFile = Annotated[
    Path | None,
    typer.Option("--run-file", "-f", envvar="HONED_RUN_FILE", help="The run file (YAML). Unset: all defaults."),
]


class Service(StrEnum):
    """What `honed serve` can serve."""

    generation = "generation"
    reward = "reward"
    preference = "preference"
    learner = "learner"


class Job(StrEnum):
    """What `honed job` can run."""

    pretrain = "pretrain"
    reward_model = "reward-model"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(up)
    app.command()(demo)
    app.command()(serve)
    app.command(hidden=True)(job)


def up(run_file: RunFile = None) -> None:
    """Run everything on this machine: all services, the training phases, the online loop.

    Services that die are started again. Ctrl-C ends the run cleanly; the same command goes on where it was. Without a run file
    it is the demo's run, served in out/demo.

    Example: honed up --run-file run.yaml
    """
    from honed.settings_file import recipe_settings

    _keep_private()
    asyncio.run(_up(recipe_settings(run_file, "demo")))


def demo(
    run_file: RunFile = None,
    directory: Annotated[Path, typer.Option(help="Where everything goes; the report among it.")] = Path("out/demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything serving at the end, until Ctrl-C.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh/--resume", help="Begin anew, or go on with what is there.")] = True,
) -> None:
    """Fine-tune a tiny model online on real human ratings, and report what changed.

    Needs no GPU and about ten minutes on two cores. Writes report.html and report.json.

    Example: honed demo --keep
    """
    from honed.cli.demo import demo_settings, run_demo

    _keep_private()
    asyncio.run(run_demo(demo_settings(run_file, directory), keep=keep, fresh=fresh))


def serve(service: Annotated[Service, typer.Argument(help="Which service.")], run_file: RunFile = None) -> None:
    """Serve one service until SIGTERM. This is what a container runs.

    Example: honed serve generation --run-file /etc/honed/run.yaml
    """
    import importlib

    from honed.kit.log import configure_logging
    from honed.runtime import service_name
    from honed.settings_file import load_settings

    _keep_private()
    settings = load_settings(run_file)
    configure_logging(service.value, settings.log_level)
    service_name.set(service.value)
    module = importlib.import_module(f"honed.{service.value}.main")
    asyncio.run(module.run(settings))


def job(name: Annotated[Job, typer.Argument(help="Which job.")], run_file: RunFile = None) -> None:
    """Run one training job to its end."""
    from honed.kit.log import configure_logging
    from honed.runtime import service_name
    from honed.settings_file import load_settings

    _keep_private()
    settings = load_settings(run_file)
    configure_logging(name.value, settings.log_level)
    service_name.set("learner")  # jobs are the learner's
    if name is Job.pretrain:
        from honed.learner.jobs import pretrain

        asyncio.run(asyncio.to_thread(pretrain.run, settings))
    else:
        from honed.learner.jobs import reward_model

        asyncio.run(reward_model.run(settings))


def _keep_private() -> None:
    """Whatever this process and its children write, texts and pseudonyms among it, only its user can read."""
    os.umask(0o077)


async def _up(settings: RunSettings) -> None:
    from rich.console import Console

    from honed.cli.display import show
    from honed.conductor.local import local_run
    from honed.kit.log import configure_logging

    configure_logging("conductor", "WARNING")
    console = Console()
    async with local_run(settings) as run:
        display = asyncio.ensure_future(show(run, console))
        try:
            await run.execute()
            console.print("The run is done. Everything goes on serving; Ctrl-C ends it.")
            await run.stopping.wait()
        finally:
            display.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await display
