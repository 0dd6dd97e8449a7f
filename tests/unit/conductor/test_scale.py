"""Claims about more and fewer processes of a service, over processes that are made up."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from honed.artifacts.store import PolicyStore
from honed.conductor import service as module
from honed.conductor.endpoints import with_ports
from honed.conductor.fleet import LocalFleet
from honed.conductor.launcher import ProcessSpec, ProcessState
from honed.conductor.processes import Processes
from honed.conductor.run import Run
from honed.conductor.service import ConductorService
from honed.conductor.versions import Versions
from honed.config import RunSettings
from honed.kit.errors import DeadlineExceeded
from honed.queue.members import Member
from honed.v1 import conductor_pb2


class FakeLauncher:
    """Every process is ready at once, except those that are late."""

    def __init__(self) -> None:
        self.processes: dict[str, ProcessState] = {}
        self.late: set[str] = set()
        self.started = asyncio.Event()

    async def start(self, spec: ProcessSpec, timeout_s: float) -> None:
        state = self.processes[spec.name] = ProcessState(spec.name, pid=1)
        self.started.set()
        if spec.name in self.late:
            raise DeadlineExceeded(f"{spec.name} was not ready within {timeout_s:g} s")
        state.ready = True

    async def run_job(self, spec: ProcessSpec, timeout_s: float) -> None: ...

    async def end(self, name: str) -> None:
        del self.processes[name]

    def states(self) -> list[ProcessState]:
        return list(self.processes.values())

    async def stop(self) -> None: ...


class World:
    """A conductor of one reward process that is up."""

    def __init__(self, root: Path) -> None:
        tree = {"directory": str(root / "run"), "security": {"authentication": False}}
        self.settings = with_ports(RunSettings.model_validate(tree))
        self.launcher = FakeLauncher()
        processes = Processes(self.settings, root / "run" / "effective.yaml")
        self.fleet = LocalFleet(self.settings, self.launcher, processes, lambda current: None)
        run = Run(self.settings, self.fleet, PolicyStore(self.settings.policy_url, self.settings.run))
        run.workspace.root.mkdir()
        self.endpoints = run.workspace.endpoints
        self.roster = run.roster
        self.service = ConductorService(run, Versions(self.settings, self.fleet, run.store, run.workspace))

    async def scale(self, replicas: int) -> conductor_pb2.Run:
        request = conductor_pb2.SetReplicasRequest(service="reward", replicas=replicas)
        return (await self.service.SetReplicas(request, None)).run

    async def register(self, replicas: int, *, ready: bool) -> None:
        addresses = [self.fleet.address(f"reward-{number}") for number in range(replicas)]
        await self.roster.note({"reward": [Member(f"r-{a}", a, ready=ready) for a in addresses]})


@pytest.fixture
async def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    await world.fleet.start("reward", 5)
    await world.register(1, ready=True)
    return world


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_call_for_more_answers_when_the_newcomer_is_announced_and_registered(world: World) -> None:
    world.launcher.started.clear()
    asking = asyncio.ensure_future(world.scale(2))
    await world.launcher.started.wait()
    await settled()
    newcomer = world.fleet.address("reward-1")
    assert newcomer.partition(":")[2] in json.loads(world.endpoints.read_text())["reward"], "it is in endpoints.json"
    await world.register(2, ready=False)
    await settled()
    assert not asking.done(), "GetRun does not list it as ready yet"
    await world.register(2, ready=True)
    answer = await asking
    assert [(p.name, p.healthy, p.address) for p in answer.processes] == [
        ("reward-0", True, world.fleet.address("reward-0")),
        ("reward-1", True, newcomer),
    ]


async def test_a_newcomer_that_does_not_come_in_time_is_named_and_the_same_call_again_waits_for_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REGISTERED_TIMEOUT_S", 0.05)
    world.launcher.late = {"reward-1"}
    with pytest.raises(DeadlineExceeded, match="reward-1 was not ready within"):
        await world.scale(2)
    newcomer = world.fleet.address("reward-1")
    with pytest.raises(DeadlineExceeded, match=f"reward at {newcomer} is started, but has not registered as ready"):
        await world.scale(2)
    await world.register(2, ready=True)
    assert [p.address for p in (await world.scale(2)).processes] == [world.fleet.address("reward-0"), newcomer]


async def test_a_call_for_fewer_waits_for_nobody(world: World) -> None:
    asking = asyncio.ensure_future(world.scale(3))
    while len(world.launcher.processes) < 3:
        await asyncio.sleep(0)
    await settled()
    await world.register(3, ready=True)
    await asking
    await world.roster.note({})  # Redis is away
    assert [p.name for p in (await world.scale(1)).processes] == ["reward-0"]
