"""Claims about a process that cannot start: its last line on stderr says why, and its exit status whether it may pass.

A container's termination message is made of that line. Each process is the real one, as a container runs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.support.run import environment, run_tree, write_run_file

from honed.topology import SERVICES

GONE = "127.0.0.1:1"
PASSING = os.EX_TEMPFAIL
Ended = tuple[int, str, str]


def start(tmp_path: Path, tree: Mapping[str, Any], *command: str, timeout_s: float = 90.0, **variables: str) -> Ended:
    """Runs to the end: exit status, last line of stderr, all of stderr."""
    run_file = write_run_file(tmp_path / "run.yaml", tree)
    done = subprocess.run(
        [sys.executable, "-m", "honed.cli.main", *command, "--run-file", str(run_file)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=environment(*map(Path, filter(None, sys.path)), **variables),
    )
    return done.returncode, done.stderr.strip().splitlines()[-1], done.stderr


def elsewhere(tmp_path: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A run whose services are started one by one, at addresses of their own."""
    tree = run_tree(tmp_path)
    for name in SERVICES:
        tree[name] = {**tree.get(name, {}), "address": f"{name}.invalid:50051", "host": "127.0.0.1"}
    tree["generation"]["control_address"] = "generation.invalid:50052"
    tree["conductor"]["launcher"] = "none"
    tree["queue"] = {**tree["queue"], "url": f"redis://{GONE}/0"}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return tree


def plain(ended: Ended, status: int, words: str) -> None:
    found, last, everything = ended
    assert (found, words in last) == (status, True), everything
    assert last.startswith("honed: ")
    assert "Traceback" not in everything
    assert "internal error" not in last


@pytest.mark.parametrize("service", SERVICES)
def test_a_token_table_that_is_missing(service: str, tmp_path: Path) -> None:
    """The Secret is not mounted, or not made."""
    tree = elsewhere(tmp_path, security={"tokens": str(tmp_path / "tokens")})
    words = f"token table {tmp_path / 'tokens' / 'table.json'} does not exist: `honed tokens"
    plain(start(tmp_path, tree, "serve", service), 1, words)


@pytest.mark.parametrize("service", ["preference", "conductor"])
def test_a_certificate_that_is_missing(service: str, tmp_path: Path) -> None:
    tls = {name: str(tmp_path / "tls" / name) for name in ("authority", "certificate", "key")}
    plain(
        start(tmp_path, elsewhere(tmp_path, security={"tls": tls}), "serve", service), 1, "check security.tls in the run file"
    )


@pytest.mark.parametrize("service", ["conductor", "learner"])
def test_a_redis_password_that_is_missing(service: str, tmp_path: Path) -> None:
    tree = elsewhere(tmp_path, queue={"password_file": str(tmp_path / "password")})
    plain(start(tmp_path, tree, "serve", service), 1, f"queue.password_file {tmp_path / 'password'} cannot be read")


def test_a_run_file_that_is_wrong(tmp_path: Path) -> None:
    plain(
        start(tmp_path, {"learner": {"bach": 3}}, "serve", "preference"),
        1,
        "learner.bach: unknown key; did you mean learner.batch?",
    )


@pytest.fixture
def taken() -> Iterator[int]:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield listener.getsockname()[1]


def test_a_port_that_is_taken(taken: int, tmp_path: Path) -> None:
    tree = elsewhere(tmp_path, preference={"port": taken})
    plain(start(tmp_path, tree, "serve", "preference"), 1, f"cannot listen on 127.0.0.1:{taken}")


def test_a_database_that_is_away_may_come_back(tmp_path: Path) -> None:
    url = f"postgresql://honed:pa55word@{GONE}/honed"
    ended = start(tmp_path, elsewhere(tmp_path), "serve", "preference", HONED_PREFERENCE__DATABASE_URL=url)
    plain(ended, PASSING, "database postgresql+asyncpg://honed:***@127.0.0.1:1/honed cannot be reached")
    assert "pa55word" not in ended[2]


def test_a_schema_that_is_ahead_of_the_code(tmp_path: Path) -> None:
    tree = elsewhere(tmp_path)
    assert start(tmp_path, tree, "job", "migrate")[0] == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "run" / "preference.sqlite")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    for command in (("serve", "preference"), ("job", "migrate")):
        plain(start(tmp_path, tree, *command), 1, "has schema revision '9999', which is ahead of this build's '0002'")


def test_a_schema_that_nobody_has_migrated(tmp_path: Path) -> None:
    tree = elsewhere(tmp_path, preference={"migrate": "job", "migration_deadline_s": 0.5})
    plain(start(tmp_path, tree, "serve", "preference"), PASSING, "has no schema, which is behind this build's '0002'")


@pytest.mark.parametrize(
    ("service", "words"),
    [
        ("generation", "the policy store holds no version of run 'small'"),
        ("learner", "version 0.0 of run small is not in the store"),
    ],
)
def test_a_store_without_a_version(service: str, words: str, tmp_path: Path) -> None:
    plain(start(tmp_path, elsewhere(tmp_path), "serve", service), 1, words)


@pytest.mark.parametrize("command", [("serve", "generation"), ("serve", "learner"), ("job", "pretrain")])
def test_a_store_that_is_away_may_come_back(command: tuple[str, str], tmp_path: Path) -> None:
    tree = elsewhere(tmp_path, policy={"url": f"webhdfs://{GONE}/policy"})
    plain(start(tmp_path, tree, *command), PASSING, "policy")


def test_a_store_whose_package_is_missing(tmp_path: Path) -> None:
    tree = elsewhere(tmp_path, policy={"url": "abfs://container/policy"})
    plain(start(tmp_path, tree, "wait", "version"), 1, "policy.url: 'abfs://container/policy' cannot be opened")


def test_a_job_whose_data_is_missing(tmp_path: Path) -> None:
    tree = elsewhere(tmp_path, conductor={"start_from": str(tmp_path / "none")})
    plain(start(tmp_path, tree, "job", "pretrain"), 1, str(tmp_path / "none"))


def test_a_fault_of_the_program_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    """And the last line says that it is one."""
    code = (
        "import honed.preference.main as main\n"
        "async def run(settings):\n"
        "    raise ZeroDivisionError('oops')\n"
        "main.run = run\n"
        "from honed.cli.entry import main\n"
        "main()\n"
    )
    run_file = write_run_file(tmp_path / "run.yaml", elsewhere(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "preference", "--run-file", str(run_file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(*map(Path, filter(None, sys.path))),
    )
    *logged, last = done.stderr.strip().splitlines()
    assert (done.returncode, last.startswith("honed: internal error, ZeroDivisionError: oops")) == (1, True)
    record = json.loads(logged[-1])
    assert (record["level"], "ZeroDivisionError: oops" in record["error"]) == ("error", True)
