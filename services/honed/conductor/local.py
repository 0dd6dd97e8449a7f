"""A whole run on one machine: `honed up`. Ports, tokens, processes, the conductor's own service, and the clean end."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from honed.artifacts.store import PolicyStore
from honed.conductor.endpoints import with_ports
from honed.conductor.launcher import ProcessLauncher
from honed.conductor.processes import Processes
from honed.conductor.run import Run
from honed.conductor.service import ConductorService
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition
from honed.kit.server import Listener, Server, Servicer
from honed.kit.tokens import ensure_local_tokens
from honed.kit.wiring import server_options
from honed.queue.embedded import stop_leftover
from honed.settings_file import write_settings
from honed.v1 import conductor_pb2_grpc
from honed.workspace import Workspace

LOCK = "run.lock"
SERVICES = ("generation", "reward", "preference", "learner", "conductor")


@asynccontextmanager
async def local_run(settings: RunSettings, *, fresh: bool = False) -> AsyncIterator[Run]:
    """Prepares a run and its conductor; whoever enters executes it. Everything that was started ends with the block.

    SIGINT and SIGTERM set the run's `stopping`.

    Args:
        settings: the run's; ports that are 0 are chosen here.
        fresh: whether to remove what an earlier run left in the directory.

    Raises:
        FailedPrecondition: another process runs in the same directory, or the directory cannot be used.
    """
    place = Workspace(settings.directory)
    _check_ours(place.root)
    with _alone(place.root):
        await asyncio.to_thread(stop_leftover, place.redis)
        if fresh:
            _clear(place.root)
        settings = with_ports(_resolved(settings))
        place = Workspace(settings.directory)
        if settings.security.authentication:
            ensure_local_tokens(settings.tokens_directory)
        write_settings(settings, place.effective_settings)
        launcher = ProcessLauncher(place.logs, settings.conductor.restart_limit)
        run = Run(settings, launcher, Processes(settings, place.effective_settings))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, run.stopping.set)
        service = ConductorService(run, PolicyStore(settings.policy_url, settings.run))
        servicer = Servicer("honed.v1.ConductorService", conductor_pb2_grpc.add_ConductorServiceServicer_to_server, service)
        mine = settings.conductor
        server = Server([Listener(mine.host, mine.port, [servicer])], server_options(settings, mine))
        try:
            await server.start()
            await server.ready()
            _announce(settings, place.root)
            yield run
        finally:
            await launcher.stop()
            await server.stop()
            (place.root / "endpoints.json").unlink(missing_ok=True)


def _check_ours(directory: Path) -> None:
    """Refuses to work in a directory that holds something else."""
    if directory.is_dir() and any(directory.iterdir()) and not (directory / LOCK).exists():
        raise FailedPrecondition(f"{directory} is not empty and holds no run of honed: choose another directory")


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _resolved(settings: RunSettings) -> RunSettings:
    """Makes paths absolute, for child processes."""
    return settings.model_copy(update={"directory": settings.directory.absolute()})


def _announce(settings: RunSettings, root: Path) -> None:
    """Tells clients on this machine where the services are."""
    endpoints: dict[str, object] = {name: getattr(settings, name).target for name in SERVICES}
    if settings.security.authentication:
        endpoints["token_file"] = os.path.relpath(settings.tokens_directory / "application.token", root)
    if settings.security.tls is not None:
        endpoints["tls"] = settings.security.tls.model_dump(mode="json")
    partial = root / "endpoints.partial"
    partial.write_text(json.dumps(endpoints, indent=2) + "\n")
    partial.rename(root / "endpoints.json")


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Holds the directory's lock; the kernel lets go of it when this process ends, however it ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / LOCK).open("a+")
    except OSError as error:
        raise FailedPrecondition(f"the run's directory {directory} cannot be used: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise FailedPrecondition(
                f"{directory} is in use by the run of process {lock.read().strip() or 'unknown'}: "
                "stop it, or choose another `directory` in the run file"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
