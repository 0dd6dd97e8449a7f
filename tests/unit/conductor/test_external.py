"""Claims about a conductor whose services are started by others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.support.run import run_tree, settings_of, until

from honed.artifacts.store import PolicyStore
from honed.conductor import main
from honed.conductor.external import ExternalFleet
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, InvalidArgument


def settings(root: Path, **queue: str) -> RunSettings:
    tree = run_tree(root, conductor={"launcher": "none"}, learner={"port": 1})
    return settings_of({**tree, "queue": queue, "security": {"authentication": False}})


def make_fleet(root: Path) -> ExternalFleet:
    found = settings(root, url="redis://127.0.0.1:1/0")
    return ExternalFleet(found, PolicyStore(found.policy_url, found.run))


async def test_it_starts_and_ends_nothing(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    with pytest.raises(FailedPrecondition, match="scale generation where it is deployed"):
        await fleet.scale("generation", 2)
    with pytest.raises(InvalidArgument, match="runs as one process"):
        await fleet.scale("learner", 2)


async def test_a_service_that_does_not_come_is_waited_for_under_an_alarm(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    waiting = asyncio.ensure_future(fleet.start("learner", 0.05))
    await until(lambda: fleet.states() and fleet.states()[0].alarm, 10, "the alarm")
    assert "no learner service is ready at 127.0.0.1:1: start one by `honed serve learner`" in fleet.states()[0].alarm
    assert not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_redis_that_does_not_answer_is_waited_for_under_an_alarm(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    waiting = asyncio.ensure_future(fleet.start_redis(0.05))
    await until(lambda: fleet.states() and fleet.states()[0].alarm, 10, "the alarm")
    assert fleet.states()[0].alarm.startswith("Redis does not answer")
    await asyncio.sleep(0.2)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_pretraining_elsewhere_is_done_when_the_base_version_is_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("honed.conductor.external.POLL_S", 0.01)
    fleet = make_fleet(tmp_path)
    waiting = asyncio.ensure_future(fleet.run_job("pretrain"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    version = tmp_path / "run" / "policy" / "small" / "0.0"
    version.mkdir(parents=True)
    (version / "manifest.json").write_text("{}")
    async with asyncio.timeout(10):
        await waiting


async def test_without_a_redis_of_its_own_or_with_processes_it_says_what_to_set(tmp_path: Path) -> None:
    found = settings(tmp_path)
    with pytest.raises(FailedPrecondition, match=r"queue\.url is not set"):
        ExternalFleet(found, PolicyStore(found.policy_url, found.run))
    with pytest.raises(FailedPrecondition, match=r"conductor\.launcher is process"):
        await main.run(settings_of(run_tree(tmp_path)))
