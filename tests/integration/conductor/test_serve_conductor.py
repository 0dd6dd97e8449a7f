"""A run as a cluster has it: each service on a machine of its own, and `honed serve conductor` beside them.

A machine is a working directory: the run file and every path in it are relative, so that services share `policy.url`,
`queue.url` and a copy of the tokens, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml
from tests.support.machines import Machine, machine_tree
from tests.support.run import check_books, environment, read_books, until, write_prompts
from tests.support.tiny import make_tiny_model
from typer.testing import CliRunner

from honed.cli.connection import open_peer
from honed.cli.main import app
from honed.learner.loop.journal import read_updates
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.embedded import EmbeddedRedis, free_port
from honed.queue.stats import StageStats
from honed.v1 import learner_pb2, learner_pb2_grpc
from honed.workspace import Workspace

pytestmark = [pytest.mark.redis, pytest.mark.timeout(480), pytest.mark.asyncio(loop_scope="module")]

RUN, STEPS, BATCH = "cluster", 40, 8
SERVICES = ("generation", "reward", "preference", "learner")
CONDUCTORS = ("conductor", "standby")


def run_tree(policy: Path) -> dict[str, Any]:
    return machine_tree(
        RUN,
        policy,
        learner={"batch": BATCH, "steps": STEPS, "learning_rate": 1e-3, "schedule": "constant"},
        conductor={"max_in_flight": 64, "start_timeout_s": 1.0},
        data={"evaluation": {"prompts": "prompts.jsonl", "samples": 4}},
    )


@dataclass
class Story:
    """What happened."""

    root: Path
    machines: dict[str, Machine]
    early: dict[str, tuple[int, str]] = field(default_factory=dict)
    alarm: str = ""
    online: dict[str, Any] = field(default_factory=dict)
    waiting: str = ""
    same_directory: tuple[int, str] = (0, "")
    killed_at: int = 0
    taken_over: dict[str, Any] = field(default_factory=dict)
    stopped_status: int = -1
    gone: str = ""
    finished: dict[str, Any] = field(default_factory=dict)
    scaled: tuple[int, str] = (0, "")
    exits: dict[str, int] = field(default_factory=dict)
    books: dict[str, StageStats] = field(default_factory=dict)


async def says(machine: Machine, claim: Callable[[dict[str, Any]], Any], what: str, timeout_s: float = 60.0) -> dict[str, Any]:
    """Waits until the run is as claimed, as this machine's conductor knows it."""
    last: dict[str, Any] = {}

    async def look_again() -> dict[str, Any] | None:
        nonlocal last
        last = await asyncio.to_thread(machine.status)
        return last if "phase" in last.get("run", {}) and claim(last) else None

    try:
        return dict(await until(look_again, timeout_s, what, every_s=0.1))
    except AssertionError as error:
        raise AssertionError(f"{error}; it said last: {last}; {machine.log.read_text()[-2000:]}") from None


def set_up(root: Path, tree: Mapping[str, Any], url: str) -> dict[str, Machine]:
    """The machines, each with a run file and with the tokens that are its own."""
    machines = {}
    for name in (*SERVICES, *CONDUCTORS, "job"):
        home = root / name
        home.mkdir()
        variables = {"HONED_QUEUE__URL": url}
        if name == "standby":
            variables["HONED_CONDUCTOR__PORT"] = str(free_port())
        machines[name] = Machine(name, home, environment(**variables))
        (home / "run.yaml").write_text(yaml.safe_dump(dict(tree)))
        if name in CONDUCTORS:
            write_prompts(home / "prompts.jsonl")
            shutil.copytree(root / "secret", home / "tokens")
        elif name in SERVICES:
            (home / "tokens").mkdir()
            for file in ("table.json", f"{name}.token"):
                shutil.copy(root / "secret" / file, home / "tokens" / file)
    make_tiny_model(machines["job"].root / "model", seed=1)
    return machines


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def story(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Story]:
    root = tmp_path_factory.mktemp("cluster")
    made = CliRunner().invoke(app, ["tokens", str(root / "secret")])
    assert made.exit_code == 0, made.output
    async with EmbeddedRedis(root / "redis") as url:
        story = Story(root, set_up(root, run_tree(root / "store"), url))
        try:
            async with asyncio.timeout(440):
                await tell(story, url)
        finally:
            for machine in story.machines.values():
                for process in machine.processes:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
    yield story


async def tell(story: Story, url: str) -> None:
    machines = story.machines
    conductor, standby = (machines[name] for name in CONDUCTORS)
    first = await conductor.start("conductor")
    running = {name: await machines[name].start(name) for name in ("preference", "reward")}

    # Before anybody has published the base version.
    early = await asyncio.gather(*(machines[name].ended("serve", name, "-f", "run.yaml") for name in ("generation", "learner")))
    story.early = dict(zip(("generation", "learner"), early, strict=True))
    story.alarm = (await says(conductor, lambda s: s["run"]["alarms"], "an alarm"))["run"]["alarms"][0]
    code, text = await machines["job"].ended("job", "pretrain", "-f", "run.yaml")
    assert code == 0, text
    running |= {name: await machines[name].start(name) for name in ("generation", "learner")}
    await says(conductor, lambda s: update_of(s) >= 2 and serves(s, "1."), "updates")
    await paused(conductor)
    code, text = await conductor.ended("status", "--json", "--run", "run")
    assert code == 0, text
    story.online = json.loads(text)

    # A second conductor, and the first ended by SIGKILL; a third, and the second ended by SIGTERM.
    second = await standby.start("conductor")
    story.same_directory = await conductor.ended("serve", "conductor", "-f", "run.yaml")
    waiting = await says(standby, lambda s: "waiting" in s["run"]["doing"], "the second conductor waits")
    story.waiting, story.killed_at = waiting["run"]["doing"], update_of(waiting)
    first.kill()
    await first.wait()
    story.taken_over = await says(standby, lambda s: s["run"]["doing"] == "online loop", "it takes over")
    await paused(standby, False)
    await says(standby, lambda s: update_of(s) >= story.killed_at + 10, "more updates than were on their way")
    await paused(standby)
    third = await conductor.start("conductor")
    await says(conductor, lambda s: "waiting" in s["run"]["doing"], "the third waits")
    second.send_signal(signal.SIGTERM)
    story.stopped_status = await asyncio.wait_for(second.wait(), 30)
    await paused(conductor, False)

    story.finished = await says(conductor, lambda s: s["run"]["phase"] == "finished", "the run finishes", 90)
    story.scaled = await conductor.ended("scale", "generation=2", "--run", "run")
    async with RedisLink(url, retry=RetryPolicy(deadline_s=10)) as link:
        story.books = await read_books(link, RUN)
    learner = running.pop("learner")
    learner.send_signal(signal.SIGTERM)
    story.exits["learner"] = await asyncio.wait_for(learner.wait(), 30)
    lost = await says(conductor, lambda s: not healthy(s, "learner") and s["run"]["alarms"], "the learner is gone")
    story.gone = lost["run"]["alarms"][0]
    story.exits |= await end_all({**running, "conductor": third})


async def end_all(running: Mapping[str, asyncio.subprocess.Process]) -> dict[str, int]:
    for process in running.values():
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    return {name: await asyncio.wait_for(process.wait(), 40) for name, process in running.items()}


async def paused(machine: Machine, pause: bool = True) -> None:
    """Stops the learner after its update in hand, or lets it go on, so that no conductor comes too late."""

    def call() -> None:
        with open_peer("learner", machine.run, None, None) as peer:
            stub = learner_pb2_grpc.LearnerServiceStub(peer.channel)
            if pause:
                peer.unary(stub.Pause, learner_pb2.LearnerServicePauseRequest(), 10)
            else:
                peer.unary(stub.Resume, learner_pb2.LearnerServiceResumeRequest(), 10)

    await asyncio.to_thread(call)


def serves(status: Mapping[str, Any], label: str) -> bool:
    return any(row["version"].startswith(label) for row in status["run"]["processes"])


def healthy(status: Mapping[str, Any], name: str) -> bool:
    return any(row["healthy"] for row in status["run"]["processes"] if row["name"] == name)


def update_of(status: Mapping[str, Any]) -> int:
    return int(status["learner"].get("version", "0.0").rpartition(".")[2])


async def test_services_without_a_base_version_say_how_to_publish_one(story: Story) -> None:
    for name, (code, text) in story.early.items():
        assert (name, code) == (name, 1), text
        assert "`honed job pretrain`" in text.splitlines()[-1], text
    assert "no version 0.0" in story.alarm
    assert "run `honed job pretrain` once with this run's settings" in story.alarm


async def test_status_beside_the_conductor_shows_the_run_and_who_has_registered(story: Story) -> None:
    run = story.online["run"]
    assert (run["run"], run["phase"], run["alarms"], run["target_steps"]) == (RUN, "ppo", [], STEPS)
    ready = {row["name"]: row["healthy"] for row in run["processes"]}
    assert all(ready.values())
    assert set(SERVICES) < set(ready)
    served = [row["version"] for row in run["processes"] if row["name"].startswith("generation-")]
    assert len(served) == 1
    assert served[0].startswith("1.")


async def test_services_share_no_directory(story: Story) -> None:
    homes = {name: {path.name for path in (story.root / name).iterdir()} for name in story.machines}
    assert {name for name, found in homes.items() if "model" in found} == {"job"}
    assert {name for name, found in homes.items() if "prompts.jsonl" in found} == set(CONDUCTORS)
    assert {path.name for path in (story.root / "learner" / "tokens").iterdir()} == {"table.json", "learner.token"}
    assert (story.root / "preference" / "run" / "preference.sqlite").exists()


async def test_a_second_conductor_in_the_same_directory_is_refused(story: Story) -> None:
    code, text = story.same_directory
    assert (code, "is in use by the run of process" in text) == (1, True), text


async def test_a_second_conductor_elsewhere_waits_and_says_for_whom(story: Story) -> None:
    assert story.waiting.startswith("waiting: another conductor feeds this run, and this one goes on after it")
    assert "is held by conductor-" in story.waiting


async def test_a_conductor_that_waits_takes_over_after_a_kill_and_after_a_stop(story: Story) -> None:
    assert 2 <= story.killed_at < STEPS
    assert story.taken_over["run"]["alarms"] == []
    assert story.stopped_status == 0
    assert [step.step for step in read_updates(learner_home(story))] == list(range(1, STEPS + 1))


async def test_every_rollout_is_accounted_for(story: Story) -> None:
    reasons = check_books(story.books, read_updates(learner_home(story)))
    assert set(reasons) <= {"stale", "run_finished"}
    accounts = dict(story.finished["run"]["accounts"])
    assert accounts.pop("admitted") == sum(accounts.values())
    assert (accounts["trained"], accounts["in_flight"], accounts["lost_with_redis"]) == (STEPS * BATCH, 0, 0)
    assert sum(accounts.values()) == STEPS * BATCH + sum(reasons.values())


async def test_the_report_stands_on_the_conductors_machine(story: Story) -> None:
    report = json.loads((story.root / "conductor" / "run" / "report.json").read_text())
    assert (report["outcome"], report["updates"], len(report["samples"])) == ("finished", STEPS, 4)


async def test_scaling_is_left_to_whoever_started_the_processes(story: Story) -> None:
    code, text = story.scaled
    assert (code, "scale generation where it is deployed" in text) == (1, True), text


async def test_a_service_that_is_gone_is_an_alarm(story: Story) -> None:
    assert "no learner service is ready at 127.0.0.1:" in story.gone
    assert "start one by `honed serve learner`" in story.gone


async def test_sigterm_ends_every_process_cleanly(story: Story) -> None:
    assert story.exits == dict.fromkeys((*SERVICES, "conductor"), 0)
    assert not (story.root / "conductor" / "run" / "endpoints.json").exists()


def learner_home(story: Story) -> Path:
    return Workspace(story.root / "learner" / "run").learner
