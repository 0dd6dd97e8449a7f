"""Three generators that come and go as Pods do, in a run whose every service is replaced: nothing is lost, nobody notices.

A Pod is a process with a home and an address of its own, which its successor does not have. It gets SIGTERM and has a grace, or
it is killed. Applications ask whoever is ready, as a headless Service names them, and ask another one when a call fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import yaml
from tests.support.machines import Machine, machine_tree
from tests.support.run import environment, until, write_prompts
from tests.support.tiny import make_tiny_model
from typer.testing import CliRunner

from honed.cli.main import app
from honed.kit.channel import connect
from honed.kit.tokens import read_token
from honed.learner.loop.journal import read_updates
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.embedded import EmbeddedRedis, free_port
from honed.queue.keys import RunKeys
from honed.queue.members import GENERATION, REWARD, Member, Members
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc
from honed.workspace import Workspace

pytestmark = [pytest.mark.redis, pytest.mark.timeout(700), pytest.mark.asyncio(loop_scope="module")]

RUN, BATCH = "pods", 8
GRACE_S = 40.0
TRIES, PAUSE_S, EVERY_S = 8, 0.25, 0.1


def run_tree(store: Path) -> dict[str, Any]:
    ports = {"port": 1}  # each replica is given one of its own when it starts
    return machine_tree(
        RUN,
        store,
        generation={**ports, "control_port": 1},
        reward=ports,
        # Two responses to each prompt, which train together or not at all.
        conductor={"samples_per_prompt": 2},
        learner={"algorithm": "grpo", "batch": BATCH, "steps": None, "learning_rate": 1e-4},
    )


@dataclass
class Pods:
    """The run's Pods, and what was seen of it."""

    root: Path
    link: RedisLink
    url: str
    tree: dict[str, Any]
    homes: dict[str, Machine] = field(default_factory=dict)
    running: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    exits: list[tuple[str, int]] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    accounts: dict[str, int] = field(default_factory=dict)
    at_kill: int = 0
    served_by_newcomer: str = ""
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def home(self, service: str, **variables: str) -> Machine:
        """A machine for a service, with a run file and its own token."""
        home = self.root / f"{service}-{next(self.numbers)}"
        (home / "tokens").mkdir(parents=True)
        (home / "run.yaml").write_text(yaml.safe_dump(self.tree))
        for file in ("table.json", f"{'operator' if service == 'conductor' else service}.token"):
            shutil.copy(self.root / "secret" / file, home / "tokens" / file)
        if service == "conductor":
            shutil.copytree(self.root / "secret", home / "tokens", dirs_exist_ok=True)
            write_prompts(home / "prompts.jsonl")
        return Machine(home.name, home, environment(HONED_QUEUE__URL=self.url, **variables))

    async def start(self, service: str) -> str:
        """A new replica of a service that may have several, at an address that none had before; its address."""
        port = free_port()
        variables = {f"HONED_{service.upper()}__PORT": str(port)}
        if service == GENERATION:
            variables["HONED_GENERATION__CONTROL_PORT"] = str(free_port())
        machine = self.home(service, **variables)
        address = f"127.0.0.1:{port}"
        self.running[address] = await machine.start(service)
        self.homes[address] = machine
        return address

    async def only(self, service: str) -> None:
        """The one process of a service, in the home that it had before: its volume."""
        if service not in self.homes:
            self.homes[service] = self.home(service)
        self.running[service] = await self.homes[service].start(service)

    async def stop(self, name: str) -> None:
        """SIGTERM, and the grace of a Pod."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        self.exits.append((name, await asyncio.wait_for(process.wait(), GRACE_S)))

    async def members(self, role: str) -> list[Member]:
        return [member for member in await Members(self.link, RunKeys(RUN), role).list() if member.ready]

    async def ready(self, role: str, address: str) -> Member:
        async def registered() -> Member | None:
            return next((member for member in await self.members(role) if member.address == address), None)

        found = await until(registered, 90, f"{address} is ready", every_s=0.1)
        assert isinstance(found, Member)
        return found

    async def replace(self, role: str, address: str) -> str:
        """As a rolling update with a surge of one does: the newcomer is ready, then the old one leaves."""
        newcomer = await self.start(role)
        await self.ready(role, newcomer)
        await self.stop(address)
        return newcomer

    def updates(self) -> list[int]:
        return [update.step for update in read_updates(Workspace(self.homes["learner"].run).learner)]

    async def updates_go_on(self, more: int = 4) -> None:
        goal = len(self.updates()) + more
        try:
            await until(lambda: len(self.updates()) >= goal, 120, f"{more} further updates", every_s=0.1)
        except AssertionError as error:
            said = await asyncio.to_thread(self.homes["conductor"].status)
            raise AssertionError(f"{error}; the conductor says {said}") from None

    async def ask(self) -> None:
        """An application: ten requests a second, until it is cancelled."""
        token, channels = read_token(self.root / "secret" / "application.token"), dict[str, grpc.aio.Channel]()
        numbers = itertools.count()
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    group.create_task(self._ask(next(numbers), token, channels))
                    await asyncio.sleep(EVERY_S)
        finally:
            for channel in channels.values():
                await channel.close()

    async def _ask(self, number: int, token: str, channels: dict[str, grpc.aio.Channel]) -> None:
        request = generation_pb2.GenerateRequest(
            prompt=generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=[5, 6, 7 + number % 100])),
            sampling=common_pb2.SamplingParams(max_tokens=8, fixed_length=True, seed=number),
        )
        failed = "nobody is ready"
        for attempt in range(TRIES):
            if ready := await self.members(GENERATION):
                address = ready[(number + attempt) % len(ready)].address
                channel = channels.setdefault(address, connect(address, token))
                try:
                    answer = await generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=20)
                except grpc.aio.AioRpcError as error:
                    failed = error.code().name
                else:
                    assert len(answer.samples[0].token_ids) == 8
                    self.answers["ok"] += 1
                    return
            await asyncio.sleep(PAUSE_S)
        self.answers[failed] += 1


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pods(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pods]:
    root = tmp_path_factory.mktemp("pods")
    made = CliRunner().invoke(app, ["tokens", str(root / "secret")])
    assert made.exit_code == 0, made.output
    async with (
        EmbeddedRedis(root / "redis") as url,
        RedisLink(url, retry=RetryPolicy(deadline_s=10)) as link,
    ):
        pods = Pods(root, link, url, run_tree(root / "store"))
        try:
            async with asyncio.timeout(600):  # 90 s where processes load torch in 5 s, 200 s where they take 15
                await tell(pods)
        finally:
            for process in pods.running.values():
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        yield pods


async def tell(pods: Pods) -> None:
    job = pods.home("learner")
    make_tiny_model(job.root / "model", seed=1)
    code, text = await job.ended("job", "pretrain", "-f", "run.yaml")
    assert code == 0, text
    for service in ("preference", "learner", "conductor"):
        await pods.only(service)
    reward = await pods.start(REWARD)
    generators = [await pods.start(GENERATION) for _ in range(3)]
    for address in generators:
        await pods.ready(GENERATION, address)
    asking = asyncio.create_task(pods.ask())
    await pods.updates_go_on(2)

    # A version is pushed with each update: one generator is killed meanwhile, and another one joins.
    victim = generators.pop(0)
    pods.at_kill = len(pods.updates())
    pods.running.pop(victim).kill()
    generators.append(await pods.start(GENERATION))
    pods.served_by_newcomer = (await pods.ready(GENERATION, generators[-1])).version
    await pods.updates_go_on()

    # A rolling restart of every service, one after the other.
    generators = [await pods.replace(GENERATION, address) for address in generators]
    reward = await pods.replace(REWARD, reward)
    for service in ("preference", "learner", "conductor"):
        await pods.stop(service)
        await pods.only(service)
        if service != "preference":
            await pods.updates_go_on()
    await pods.updates_go_on()
    asking.cancel()
    (end,) = await asyncio.gather(asking, return_exceptions=True)
    # Any other end came earlier, of an error that is no status: nobody would have asked since.
    assert isinstance(end, asyncio.CancelledError), end

    async def agree() -> bool:
        run = (await asyncio.to_thread(pods.homes["conductor"].status)).get("run", {})
        pods.accounts = dict(run.get("accounts") or {})
        return bool(pods.accounts) and pods.accounts["admitted"] == sum(pods.accounts.values()) - pods.accounts["admitted"]

    with contextlib.suppress(AssertionError):  # the claim below says it better
        await until(agree, 60, "the accounts agree", every_s=0.05)
    for name in list(pods.running):
        await pods.stop(name)


async def test_no_request_fails_whoever_goes(pods: Pods) -> None:
    assert pods.answers.pop("ok") > 100
    assert pods.answers == {}


async def test_a_newcomer_serves_what_was_pushed_while_it_came(pods: Pods) -> None:
    assert int(pods.served_by_newcomer.rpartition(".")[2]) >= pods.at_kill


async def test_nothing_is_lost_and_nothing_trains_twice(pods: Pods) -> None:
    records = read_updates(Workspace(pods.homes["learner"].run).learner)
    assert [record.step for record in records] == list(range(1, len(records) + 1))
    trained = Counter(rollout for record in records for rollout in record.rollout_ids)
    assert [rollout for rollout, times in trained.items() if times > 1] == []
    accounts = dict(pods.accounts)
    assert accounts.pop("admitted") == sum(accounts.values())
    assert accounts["lost_with_redis"] == 0
    assert {name for name, count in accounts.items() if count} <= {"trained", "in_flight", "dropped:stale"}


async def test_who_gets_a_sigterm_ends_by_itself(pods: Pods) -> None:
    assert [(name, code) for name, code in pods.exits if code != 0] == []
    stops = Counter(name for name, _ in pods.exits)
    assert {stops[name] for name in ("preference", "learner", "conductor")} == {2}, "replaced once, and at the end"
