"""Claims about a run's directory: one run at a time, and nothing else's."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sqlite3
from pathlib import Path

import pytest
import yaml

from honed.conductor.endpoints import joint_target, replica_section
from honed.conductor.local import local_run
from honed.conductor.processes import Processes
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition


def settings(directory: Path) -> RunSettings:
    return RunSettings(directory=directory)


async def test_a_second_run_in_the_same_directory_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with local_run(settings(directory)):
        with pytest.raises(FailedPrecondition, match=f"in use by the run of process {os.getpid()}"):
            async with local_run(settings(directory)):
                pass
        assert json.loads((directory / "endpoints.json").read_text()), "the first one's files are as they were"


async def test_the_lock_ends_with_the_run(tmp_path: Path) -> None:
    for _ in range(2):
        async with local_run(settings(tmp_path / "run")):
            pass
    with (tmp_path / "run" / "run.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_a_directory_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(FailedPrecondition, match="holds no run of honed"):
        async with local_run(settings(tmp_path), fresh=True):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


async def test_a_fresh_run_clears_what_an_earlier_one_left(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with local_run(settings(directory)):
        (directory / "models").mkdir()
        (directory / "models" / "old").write_text("weights")
    async with local_run(settings(directory), fresh=True):
        assert not (directory / "models").exists()


async def test_endpoints_are_announced_while_it_runs_and_tokens_are_private(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with local_run(settings(directory)) as run:
        endpoints = json.loads((directory / "endpoints.json").read_text())
        assert endpoints["conductor"] == run.settings.conductor.target
        assert not endpoints["conductor"].endswith(":0")
        for token in (directory / "tokens").glob("*.token"):
            assert token.stat().st_mode & 0o077 == 0
    assert not (directory / "endpoints.json").exists()


def write_database(path: Path, *sources: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE judgements (source TEXT)")
        connection.executemany("INSERT INTO judgements VALUES (?)", [(source,) for source in sources])
        connection.commit()


async def test_a_fresh_run_keeps_the_judgements_of_people_and_says_where(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with local_run(settings(directory)) as run:
        assert run.kept is None
    write_database(directory / "preference.sqlite", "made", "made", "console")
    async with local_run(settings(directory), fresh=True, expendable=("made",)) as run:
        kept = run.kept
    assert kept is not None
    assert not (directory / "preference.sqlite").exists()
    with contextlib.closing(sqlite3.connect(kept)) as connection:
        assert connection.execute("SELECT count(*) FROM judgements").fetchone() == (3,)
    async with local_run(settings(directory), fresh=True):
        assert kept.exists(), "a second fresh run leaves it where it is"


async def test_a_fresh_run_removes_judgements_that_can_be_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with local_run(settings(directory)):
        pass
    write_database(directory / "preference.sqlite", "made")
    async with local_run(settings(directory), fresh=True, expendable=("made",)) as run:
        assert run.kept is None
    assert not (directory / "preference.sqlite").exists()
    assert not (directory / "kept").exists()


async def test_a_database_that_cannot_be_read_is_kept_too(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with local_run(settings(directory)):
        (directory / "preference.sqlite").write_bytes(b"no database" * 100)
    async with local_run(settings(directory), fresh=True, expendable=("made",)) as run:
        assert run.kept is not None
        assert run.kept.read_bytes().startswith(b"no database")


async def test_replicas_are_announced_as_one_target(tmp_path: Path) -> None:
    replicas = {"generation": {"replicas": 3}, "reward": {"replicas": 2}}
    async with local_run(RunSettings.model_validate({"directory": str(tmp_path / "run"), **replicas})) as run:
        endpoints = json.loads((tmp_path / "run" / "endpoints.json").read_text())
        effective = yaml.safe_load((tmp_path / "run" / "effective.yaml").read_text())
    scheme, _, addresses = endpoints["generation"].partition(":")
    assert scheme == "ipv4"
    assert len(set(addresses.split(","))) == 3
    assert endpoints["generation"] == run.fleet.target("generation") == effective["generation"]["address"]
    assert endpoints["reward"].count(",") == 1
    assert "," not in endpoints["learner"]


@pytest.mark.parametrize(
    ("section", "tls", "reason"),
    [
        ({"address": "honed.example:4100"}, {}, "generation.address is honed.example:4100, which is one address for 2"),
        ({"host": "localhost"}, {"tls": {"authority": "a", "certificate": "b", "key": "c"}}, "set security.tls.server_name"),
        ({"host": "no-such-host.invalid"}, {}, "cannot be the host of 2 processes"),
    ],
)
def test_replicas_whose_addresses_cannot_be_joined_are_refused_with_what_to_set(
    section: dict[str, str], tls: dict[str, dict[str, str]], reason: str
) -> None:
    found = RunSettings.model_validate({"generation": {**section, "port": 4100, "control_port": 4101}, "security": tls})
    one, two = found.generation, found.generation.model_copy(update={"address": None, "port": 4200, "replica": 1})
    with pytest.raises(FailedPrecondition, match=re.escape(reason)):
        joint_target("generation", [one, two], found.security.tls)
    assert joint_target("generation", [one], found.security.tls) == one.target


def test_names_are_joined_where_a_name_of_the_certificates_is_set() -> None:
    tls = {"authority": "a", "certificate": "b", "key": "c", "server_name": "honed.internal"}
    found = RunSettings.model_validate({"generation": {"host": "localhost", "port": 4100}, "security": {"tls": tls}})
    other = found.generation.model_copy(update={"port": 4200})
    target = joint_target("generation", [found.generation, other], found.security.tls)
    assert target == "ipv4:127.0.0.1:4100,127.0.0.1:4200"


async def test_a_run_on_an_ipv6_address_is_announced_as_such(tmp_path: Path) -> None:
    tree = {"directory": str(tmp_path / "run"), "generation": {"host": "::1", "replicas": 2}, "reward": {"host": "::1"}}
    async with local_run(RunSettings.model_validate(tree)):
        endpoints = json.loads((tmp_path / "run" / "endpoints.json").read_text())
    assert endpoints["generation"].startswith("ipv6:[::1]:")
    assert endpoints["reward"].startswith("[::1]:")


def test_each_replica_has_ports_and_a_number_of_its_own(tmp_path: Path) -> None:
    section = RunSettings().generation.model_copy(update={"port": 4100, "control_port": 4101, "health_port": 4102})
    found = [replica_section(section, number) for number in range(3)]
    specs = [Processes(RunSettings(), tmp_path / "run.yaml").replica("generation", replica) for replica in found]
    assert [spec.name for spec in specs] == ["generation-0", "generation-1", "generation-2"]
    assert specs[0].environment["HONED_GENERATION__ADDRESS"] == "127.0.0.1:4100"
    for key in ("PORT", "CONTROL_PORT", "HEALTH_PORT", "REPLICA", "ADDRESS"):
        assert len({spec.environment[f"HONED_GENERATION__{key}"] for spec in specs}) == 3, key


async def test_a_run_that_others_start_is_refused_here(tmp_path: Path) -> None:
    tree = {"directory": str(tmp_path / "run"), "conductor": {"launcher": "none"}}
    with pytest.raises(FailedPrecondition, match="honed serve conductor"):
        async with local_run(RunSettings.model_validate(tree)):
            pass
