"""A whole run on one machine: `honed up`. Ports, tokens, processes, the conductor's own service, and the clean end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from honed.artifacts.store import PolicyStore
from honed.conductor.cores import cores_beside
from honed.conductor.endpoints import with_ports
from honed.conductor.fleet import LocalFleet
from honed.conductor.local_launcher import Limits, ProcessLauncher
from honed.conductor.processes import Processes
from honed.conductor.record import recorded
from honed.conductor.run import Run
from honed.conductor.service import conductor_server
from honed.conductor.tracked import tracked
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition
from honed.kit.tokens import ensure_local_tokens
from honed.queue.embedded import stop_leftover
from honed.settings_file import write_settings
from honed.tracking.start import check_tracking
from honed.workspace import Workspace


class DirectoryInUse(FailedPrecondition):
    """Another process holds the run's directory."""


@asynccontextmanager
async def local_run(settings: RunSettings, *, fresh: bool = False, expendable: Collection[str] = ()) -> AsyncIterator[Run]:
    """Prepares a run and its conductor; whoever enters executes it. Everything that was started ends with the block.

    SIGINT and SIGTERM set the run's `stopping`; a second one ends what is still busy at once.

    Args:
        settings: the run's; ports that are 0 are chosen here.
        fresh: whether to remove what an earlier run left in the directory. A preference database with judgements of people is
            kept aside; `Run.kept` says where.
        expendable: sources of judgements that can be made again, so that nothing is lost with them.

    Raises:
        FailedPrecondition: another process runs in the same directory, the directory cannot be used, or a package is not
            installed that the run file asks for, or this machine has too few cores for `learner.own_cores`.
    """
    workspace = Workspace(settings.directory)
    if settings.conductor.services_elsewhere:
        raise FailedPrecondition(
            f"conductor.launcher is {settings.conductor.launcher}, and this command starts processes: take out that line, or "
            "run `honed serve conductor` beside services that run elsewhere"
        )
    _check_ours(workspace)
    shared_cores = cores_beside(settings.learner.own_cores)
    check_tracking(settings)
    with alone(workspace):
        await asyncio.to_thread(stop_leftover, workspace.redis)
        kept = _clear(workspace, expendable) if fresh else None
        settings = with_ports(_resolved(settings))
        workspace = Workspace(settings.directory)
        if settings.security.authentication:
            ensure_local_tokens(settings.tokens_directory)
        section = settings.conductor
        launcher = ProcessLauncher(
            workspace.logs,
            Limits(section.restart_limit, section.restart_window_s, section.log_mb << 20),
            shared_cores=shared_cores,
        )
        processes = Processes(settings, workspace.effective_settings)
        fleet = LocalFleet(settings, launcher, processes, lambda current: write_settings(current, workspace.effective_settings))
        run = Run(settings, fleet, PolicyStore(settings.policy_url, settings.run))
        run.kept = kept
        server = conductor_server(run)
        with _signals(run, launcher):
            try:
                await server.start()
                await server.ready()
                fleet.announce()
                async with run.roster.running(), recorded(run), tracked(run):
                    yield run
            finally:
                workspace.endpoints.unlink(missing_ok=True)
                await launcher.stop()
                await server.stop()


@contextmanager
def _signals(run: Run, launcher: ProcessLauncher) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def asked() -> None:
        if run.stopping.is_set():
            launcher.hurry.set()
        run.stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _check_ours(workspace: Workspace) -> None:
    """Refuses to work in a directory that holds something else."""
    directory = workspace.root
    if directory.is_dir() and any(directory.iterdir()) and not workspace.lock.exists():
        raise FailedPrecondition(f"{directory} is not empty and holds no run of honed: choose another directory")


def _clear(workspace: Workspace, expendable: Collection[str]) -> Path | None:
    """Empties the directory; returns where a preference database with people's judgements was put aside."""
    kept = None
    database = workspace.preference_database
    if database.exists() and not _holds_only(database, expendable):
        kept = workspace.kept / time.strftime("%Y%m%dT%H%M%S")
        kept.mkdir(parents=True)
        for file in workspace.root.glob(f"{database.name}*"):  # the write-ahead log belongs to it
            file.rename(kept / file.name)
    for entry in workspace.root.iterdir():
        if entry not in (workspace.lock, workspace.kept):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return kept and kept / database.name


def _holds_only(database: Path, sources: Collection[str]) -> bool:
    """Whether every judgement has one of the sources. A database that cannot be read may hold anything."""
    try:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            found = {row[0] for row in connection.execute("SELECT DISTINCT source FROM judgements")}
    except sqlite3.Error:
        return False
    return found <= set(sources)


def _resolved(settings: RunSettings) -> RunSettings:
    """Makes paths absolute, for child processes."""
    return settings.model_copy(update={"directory": settings.directory.absolute()})


@contextmanager
def alone(workspace: Workspace) -> Iterator[None]:
    """Holds the directory's lock; the kernel lets go of it when this process ends, however it ends.

    Raises:
        DirectoryInUse: another process holds it.
        FailedPrecondition: the directory cannot be used.
    """
    directory = workspace.root
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = workspace.lock.open("a+")
    except OSError as error:
        raise FailedPrecondition(f"the run's directory {directory} cannot be used: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise DirectoryInUse(
                f"{directory} is in use by the run of process {lock.read().strip() or 'unknown'}: "
                "stop it, or choose another `directory` in the run file"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
