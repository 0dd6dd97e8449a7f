"""`honed up`, `honed demo`, `honed serve` and `honed job`: what starts processes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:  # the help is there at once
    from honed.config import RunSettings
    from honed.kit.tracing import Span

_LAST_TRACE_S: Final = 3.0
"""How long the end of a job waits for its trace: a second longer than the trace for its collector."""

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
    conductor = "conductor"


class Job(StrEnum):
    """What `honed job` can run."""

    pretrain = "pretrain"
    reward_model = "reward-model"
    migrate = "migrate"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(epilog="Example: honed up run.yaml --replicas generation=2,reward=2")(up)
    app.command(epilog="Example: honed demo --keep")(demo)
    app.command(epilog="Example: honed serve generation --run-file /etc/honed/run.yaml")(serve)
    app.command(epilog="Example: honed job pretrain --run-file /etc/honed/run.yaml")(job)


def up(
    file: Annotated[Path | None, typer.Argument(help="The run file (YAML), as --run-file.", metavar="RUN_FILE")] = None,
    run_file: RunFile = None,
    replicas: Annotated[
        str | None, typer.Option(help="How many processes of a service to start, in place of the run file's numbers.")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Look at the run file and its data first.")] = True,
    exit_on_failure: Annotated[
        bool, typer.Option("--exit-on-failure", help="End when training fails. Otherwise everything goes on serving.")
    ] = False,
) -> None:
    """Run everything on this machine: all services, the training phases, the online loop.

    Services that die are started again. Ctrl-C ends the run cleanly; the same command goes on where it was. When training
    fails, the reason is printed and everything goes on serving; the exit status is then 1. Without a run file it is the demo's
    run, served in out/demo.
    """
    from honed.recipes.catalogue import DEMO
    from honed.settings_file import recipe_settings
    from honed.telemetry import traced

    _keep_private()
    settings = with_replicas(recipe_settings(file or run_file, DEMO), replicas)
    if check and (file or run_file):
        from honed.cli.check import refuse_errors

        refuse_errors(settings)
    with traced(settings, "conductor"):
        asyncio.run(_up(settings, exit_on_failure=exit_on_failure))


def demo(
    run_file: RunFile = None,
    directory: Annotated[Path, typer.Option(help="Where everything goes; the report among it.")] = Path("out/demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything serving at the end, until Ctrl-C.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Begin anew, or go on with what is there. Judgements of people are kept.")
    ] = True,
) -> None:
    """Fine-tune a tiny model online on real human ratings, and report what changed.

    Needs no GPU and about ten minutes on two cores. Writes report.html and report.json.
    """
    from honed.cli.check import refuse_errors
    from honed.cli.demo import demo_settings, run_demo
    from honed.telemetry import traced

    _keep_private()
    settings = demo_settings(run_file, directory)
    refuse_errors(settings)
    with traced(settings, "conductor"):
        asyncio.run(run_demo(settings, keep=keep, fresh=fresh))


def serve(service: Annotated[Service, typer.Argument(help="Which service.")], run_file: RunFile = None) -> None:
    """Serve one service until SIGTERM. This is what a container runs.

    `honed serve conductor` drives a run whose services are started by others: with `conductor: {launcher: none}` its jobs too,
    with `kubernetes` they run as Jobs of the cluster.
    Exit status 75: it ended for a reason that may pass. The last line on stderr says which.
    """
    import importlib

    from honed.kit.log import configure_logging
    from honed.kit.memory import keep_freed_memory
    from honed.runtime import check_start, service_name
    from honed.settings_file import load_settings
    from honed.telemetry import traced
    from honed.topology import SERVICES

    _keep_private()
    if service is Service.learner:
        keep_freed_memory()
    settings = load_settings(run_file)
    configure_logging(service.value, settings.log_level)
    service_name.set(service.value)
    with _last_words():
        check_start(settings, service.value)
        with traced(settings, service.value):
            with _no_collections():
                module = importlib.import_module(SERVICES[service.value].module)
            asyncio.run(module.run(settings))


def job(name: Annotated[Job, typer.Argument(help="Which job.")], run_file: RunFile = None) -> None:
    """Run one job to its end. `honed up` does so by itself; beside `honed serve` somebody has to.

    `pretrain` publishes version 0.0, from which everything starts: the model of conductor.start_from, or one trained on
    data.texts; fine-tuned on data.demonstrations if there are any. `reward-model` trains on the judgements of the preference
    service. Both publish into policy.url. `migrate` brings the preference database to this build's schema, for a service with
    `preference: {migrate: job}`.
    Exit status 75: it failed for a reason that may pass.
    """
    from honed.kit import tracing
    from honed.kit.log import configure_logging
    from honed.kit.memory import keep_freed_memory
    from honed.runtime import service_name
    from honed.settings_file import load_settings
    from honed.telemetry import traced

    _keep_private()
    keep_freed_memory()
    settings = load_settings(run_file)
    configure_logging(name.value, settings.log_level)
    service_name.set("learner")  # jobs are the learner's
    with (
        _last_words(),
        traced(settings, name.value),
        tracing.span(f"job {name.value}", head=True) as span,
        _traced_at_sigterm(span),
    ):
        if name is Job.pretrain:
            with _no_collections():
                from honed.learner.jobs import pretrain

            asyncio.run(asyncio.to_thread(pretrain.run, settings))
        elif name is Job.reward_model:
            with _no_collections():
                from honed.learner.jobs import reward_model

            asyncio.run(reward_model.run(settings))
        else:
            from honed.preference.main import migrate_database

            typer.echo(asyncio.run(migrate_database(settings)))


@contextmanager
def _no_collections() -> Iterator[None]:
    """While modules are imported: what they make stays, and looking for what does not would take a tenth of the time."""
    import gc

    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def with_replicas(settings: RunSettings, asked: str | None) -> RunSettings:
    """The settings with the numbers of `generation=2,reward=2`.

    Raises:
        ValueError: a service is unknown or runs as one process, or a number is none.
    """
    sections = {}
    for service, replicas in parse_replicas((asked or "").split(",") if asked else ()):
        sections[service] = getattr(settings, service).model_copy(update={"replicas": replicas})
    return settings.model_copy(update=sections)


def parse_replicas(asked: Sequence[str], least: int = 1) -> list[tuple[str, int]]:
    """Reads `generation=2`, one each; no number may be below `least`.

    Raises:
        ValueError: a service is unknown or runs as one process, or a number is none.
    """
    from honed.topology import REPLICATED

    found = []
    for part in asked:
        service, _, number = part.strip().partition("=")
        if service not in REPLICATED or not number.isdecimal() or int(number) < least:
            raise ValueError(f"{part.strip()!r} is not of the form SERVICE=NUMBER with one of {', '.join(REPLICATED)}")
        found.append((service, int(number)))
    return found


@contextmanager
def _last_words() -> Iterator[None]:
    """Whatever ends the block by an error, the last line on stderr says why: it becomes the termination message of a container.

    An error that may pass ends with status 75; a fault of this program leaves its traceback in the log.
    """
    from honed.cli.failure import describe, is_fault
    from honed.kit.errors import may_pass

    try:
        yield
    except Exception as error:
        if is_fault(error):
            logging.getLogger(__name__).exception("a fault of this program")
        if not may_pass(error):
            raise
        typer.echo(f"honed: {describe(error)}", err=True)
        raise typer.Exit(os.EX_TEMPFAIL) from error


@contextmanager
def _traced_at_sigterm(span: Span) -> Iterator[None]:
    """A SIGTERM inside of the block ends the process as it would have, after the job's trace has gone out.

    Not by SystemExit: jobs train in threads, and the loop's end would wait for those until the SIGKILL.
    """
    from honed.kit import tracing

    if not tracing.is_on():
        yield
        return

    def finish() -> None:
        span.fail("cancelled")
        span.end()
        tracing.stop()

    def end(number: int, _: FrameType | None) -> None:
        # In a thread: the signal may have come while this one held a lock that the span needs.
        finishing = threading.Thread(target=finish, name="finish-trace", daemon=True)
        finishing.start()
        finishing.join(_LAST_TRACE_S)
        if os.getpid() == 1:  # the kernel gives it no default action
            os._exit(128 + number)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep_private() -> None:
    """Whatever this process and its children write, texts and pseudonyms among it, only its user can read."""
    os.umask(0o077)


async def _up(settings: RunSettings, *, exit_on_failure: bool) -> None:
    from honed.cli import output
    from honed.cli.display import showing
    from honed.conductor.local import local_run
    from honed.conductor.summary import write_summary
    from honed.kit.errors import root_cause
    from honed.kit.log import configure_logging, log_to
    from honed.recipes.made.base import make_data

    configure_logging("conductor", "WARNING")
    console = output.console()
    async with local_run(settings) as run:
        log_to(run.workspace.conductor_log)
        await asyncio.to_thread(make_data, run.settings)
        failure: Exception | None = None
        async with showing(run.settings, console):
            try:
                await run.execute(end_on_failure=exit_on_failure)
            except Exception as error:  # whatever it is, what was started goes on serving
                failure = error
            if run.state.loop_started_at is not None:
                await write_summary(run)
        serving = bool(run.fleet.states()) and not run.stopping.is_set()
        if failure is None and serving:
            console.print(f"The run is done; report: {run.workspace.report_html}")
            console.print("Everything goes on serving; Ctrl-C ends it.")
            await run.stand_by(end_on_failure=exit_on_failure)
        elif failure is not None and serving and not exit_on_failure:
            console.print(f"Training has failed: {root_cause(failure)}")
            console.print("What was started goes on serving; Ctrl-C ends it.")
            await (run.stopping.wait() if run.state.loop_started_at is None else run.stand_by())
        if failure is not None:
            raise failure
