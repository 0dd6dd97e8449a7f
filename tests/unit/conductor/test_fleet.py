"""Claims about the services of a run as child processes, over a launcher that is made up."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from honed.conductor.endpoints import with_ports
from honed.conductor.fleet import LocalFleet
from honed.conductor.launcher import ProcessSpec, ProcessState
from honed.conductor.processes import Processes
from honed.conductor.service import ConductorService
from honed.config import RunSettings
from honed.kit.errors import Unavailable
from honed.topology import SERVICES
from honed.v1 import conductor_pb2


class FakeLauncher:
    """A process is ready when a test says so."""

    def __init__(self) -> None:
        self.specs: dict[str, ProcessSpec] = {}
        self.ready: dict[str, asyncio.Future[None]] = {}
        self.waiting: set[str] = set()

    async def start(self, spec: ProcessSpec, timeout_s: float) -> None:
        self.specs[spec.name] = spec
        self.waiting.add(spec.name)
        try:
            await asyncio.shield(self.ready.setdefault(spec.name, asyncio.get_running_loop().create_future()))
        finally:
            self.waiting.discard(spec.name)

    async def run_job(self, spec: ProcessSpec, timeout_s: float) -> None: ...

    async def end(self, name: str) -> None:
        del self.specs[name]

    def states(self) -> list[ProcessState]:
        return [ProcessState(name) for name in self.specs]

    async def stop(self) -> None: ...


@pytest.fixture
def launcher() -> FakeLauncher:
    return FakeLauncher()


@pytest.fixture
def fleet(tmp_path: Path, launcher: FakeLauncher) -> LocalFleet:
    tree = {"directory": str(tmp_path), "generation": {"replicas": 2}, "security": {"authentication": False}}
    settings = with_ports(RunSettings.model_validate(tree))
    return LocalFleet(settings, launcher, Processes(settings, tmp_path / "run.yaml"), lambda _: None)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_ready_replica_is_enough_to_go_on(fleet: LocalFleet, launcher: FakeLauncher) -> None:
    starting = asyncio.ensure_future(fleet.start("generation", 30))
    await turns()
    launcher.ready["generation-1"].set_result(None)
    await asyncio.wait_for(starting, 10)
    assert launcher.waiting == {"generation-0"}, "the launcher raises an alarm when it is late"


async def test_a_replica_that_is_late_holds_nobody_up(fleet: LocalFleet, launcher: FakeLauncher) -> None:
    starting = asyncio.ensure_future(fleet.start("generation", 30))
    await turns()
    launcher.ready["generation-0"].set_exception(Unavailable("generation-0 was not ready within 30 s"))
    await turns()
    assert not starting.done()
    launcher.ready["generation-1"].set_result(None)
    await asyncio.wait_for(starting, 10)


async def test_newcomers_start_one_after_another_and_stand_back_until_they_are_ready(
    fleet: LocalFleet, launcher: FakeLauncher, tmp_path: Path
) -> None:
    starting = asyncio.ensure_future(fleet.start("generation", 30))
    await turns()
    for number in range(2):
        launcher.ready[f"generation-{number}"].set_result(None)
    await starting
    scaling = asyncio.ensure_future(fleet.scale("generation", 4))
    await turns()
    assert set(launcher.specs) == {"generation-0", "generation-1", "generation-2"}
    assert fleet.target("generation").count(",") == 1, "announced when it is ready"
    launcher.ready["generation-2"].set_exception(Unavailable("generation-2 was not ready within 180 s"))
    await turns()
    assert "generation-3" in launcher.specs, "one that is late holds nobody up for longer"
    launcher.ready["generation-3"].set_result(None)
    with pytest.raises(Unavailable, match="generation-2"):
        await scaling
    assert fleet.target("generation").count(",") == 3
    newcomer, first = launcher.specs["generation-3"], launcher.specs["generation-0"]
    assert (newcomer.nice, newcomer.starting_nice) == (0, SERVICES["learner"].nice)
    assert (first.nice, first.starting_nice) == (0, None)


async def test_a_caller_that_gives_up_does_not_leave_the_scaling_at_half(fleet: LocalFleet, launcher: FakeLauncher) -> None:
    starting = asyncio.ensure_future(fleet.start("generation", 30))
    await turns()
    for number in range(2):
        launcher.ready[f"generation-{number}"].set_result(None)
    await starting
    run: Any = SimpleNamespace(settings=RunSettings(), fleet=fleet)
    service = ConductorService(run, None)  # type: ignore[arg-type]
    request = conductor_pb2.SetReplicasRequest(service="generation", replicas=4)
    calling = asyncio.ensure_future(service.SetReplicas(request, None))
    await turns()
    calling.cancel()
    await turns()
    launcher.ready["generation-2"].set_result(None)
    await turns()
    assert "generation-3" in launcher.specs
    launcher.ready["generation-3"].set_result(None)
    await turns()
    assert fleet.target("generation").count(",") == 3


async def test_without_a_ready_replica_the_first_reason_is_told(fleet: LocalFleet, launcher: FakeLauncher) -> None:
    starting = asyncio.ensure_future(fleet.start("generation", 30))
    await turns()
    for number in (1, 0):
        launcher.ready[f"generation-{number}"].set_exception(Unavailable(f"generation-{number} was not ready"))
    with pytest.raises(Unavailable, match="generation-0 was not ready"):
        await starting
