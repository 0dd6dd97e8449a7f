"""A long run under chaos: does it lose, double or leak anything, and do the generators go on answering?

    python -m loadtest.soak                      45 minutes, a kill -9 every 60 s, every fault of `faults` once
    python -m loadtest.soak --minutes 5          the same faults closer together

`honed up` trains without end on a tiny random model, with two generation replicas, beside a steady 5 requests a second of the
standard client. Killed are the processes that `honed up` started, grandchildren among them; not `honed up` itself, whose end is
the end of all that it started. The directory is a file system of its own (a tmpfs, which needs root) so that the disk can be
full; without root that one fault is left out and the result says so. The last line is one JSON object; exit status 1: a bar
was missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from redis.exceptions import RedisError

from honed.v1 import common_pb2, generation_pb2, learner_pb2
from loadtest import report
from loadtest.faults import FAULTS, FILL_DISK, POISONED, NotNow
from loadtest.live_run import LiveRun, live_run, run_tree
from loadtest.resources import ResourceLog, Usage, descendants, usage
from loadtest.scratch import scratch_directory
from loadtest.timetable import KILL, Timetable

REQUESTS_PER_S = 5.0
REQUEST_TIMEOUT_S = 60.0
SAMPLE_EVERY_S = 5.0
QUIET_S = 90.0
FAULT_TIMEOUT_S = 120.0
ANSWERED_BAR, GROWTH_BAR, FILES_BAR = 0.99, 1.05, 2.0
DISK_MIB = 3072


@dataclass
class Answers:
    """What became of the application's requests."""

    ok: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    @property
    def share(self) -> float:
        """Answered, of all that have ended."""
        return self.ok / max(1, self.ok + self.failed.total())


async def soak(root: Path, minutes: float, kill_every_s: float, engine: str, seed: int, *, own_disk: bool) -> dict[str, Any]:
    """Runs the soak and returns its figures."""
    tree = run_tree(
        root,
        learner={"checkpoint_every": 4, "max_staleness": 2, "keep_checkpoints": 3},
        generation={"engine": engine, "replicas": 2},
        policy={"keep": 8},
    )
    answers, resources, rng = Answers(), ResourceLog(), random.Random(seed)
    seconds = minutes * 60
    once = [name for name in FAULTS if name != KILL and (own_disk or name != FILL_DISK)]
    table = Timetable(once, kill_every_s, seconds - min(QUIET_S, seconds / 5), rng)
    async with live_run(root, tree) as run:
        first = await run.status()
        async with _beside(_ask(run, answers), _sample(run, resources)):
            events = await _hurt(run, table, seconds, rng)
            await _quiet(run)
        resources.write(root / "resources.csv")
        injected = sum(event.endswith(POISONED) for event in events)
        figures = await _figures(run, first, answers, resources, injected)
    undone = [f"{name} could not be done" for name in sorted(table.undone)]
    missed = [*figures.pop("missed"), *undone]
    return {"minutes": minutes, "engine": engine, "events": len(events), **figures, "missed": missed, "log": events}


async def _hurt(run: LiveRun, table: Timetable, seconds: float, rng: random.Random) -> list[str]:
    """Does each fault when it is due, for so many seconds; returns what was done, with the times."""
    started, events = time.monotonic(), []
    with report.progress("doing") as bar:
        task = bar.add_task("soak", total=int(seconds), doing="")
        while (now := time.monotonic() - started) < seconds:
            name = table.next(now)
            bar.update(task, completed=int(now), doing=name or "")
            if name is None:
                await asyncio.sleep(1.0)
                continue
            try:
                async with asyncio.timeout(FAULT_TIMEOUT_S):
                    what = await FAULTS[name](run, rng)
                table.done(name)
            except (NotNow, grpc.aio.AioRpcError, RedisError, OSError, TimeoutError, StopIteration) as error:
                what = f"{name} could not be done now: {error!r}"
                table.failed(name, time.monotonic() - started)
            events.append(f"{now:.0f} s: {what}")
            bar.console.print(events[-1])
    return events


async def _ask(run: LiveRun, answers: Answers) -> None:
    """A steady stream of requests, each with the standard channel's retries and a deadline."""
    number = 0
    async with asyncio.TaskGroup() as group:
        while True:
            group.create_task(_one(run, answers, number))
            number += 1
            await asyncio.sleep(1 / REQUESTS_PER_S)


async def _one(run: LiveRun, answers: Answers, number: int) -> None:
    request = generation_pb2.GenerateRequest(
        prompt=generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=[5, 6, 7 + number % 200])),
        sampling=common_pb2.SamplingParams(max_tokens=24, fixed_length=True, seed=number),
    )
    started = time.monotonic()
    while True:
        left = started + REQUEST_TIMEOUT_S - time.monotonic()
        try:
            await run.generation.Generate(request, timeout=max(0.001, left))
        except grpc.aio.AioRpcError as error:
            # As `honed.Client` does: what says "not now" is asked again until the deadline.
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED) and left > 1:
                await asyncio.sleep(min(1.0, left))
                continue
            answers.failed[error.code().name] += 1
            return
        answers.ok += 1
        answers.slowest_s = max(answers.slowest_s, time.monotonic() - started)
        return


async def _sample(run: LiveRun, resources: ResourceLog) -> None:
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            for process in (await run.get_run()).processes:
                if process.pid and process.healthy:
                    resources.add(process.name, process.pid, await asyncio.to_thread(_usage, process.pid))
        resources.add("conductor", run.process.pid, await asyncio.to_thread(usage, [run.process.pid]))
        await asyncio.sleep(SAMPLE_EVERY_S)


def _usage(pid: int) -> Usage:
    return usage(descendants(pid))


async def _quiet(run: LiveRun) -> None:
    """Waits until training has gone on for some updates after the last fault.

    Raises:
        TimeoutError: it has not.
    """
    status = None
    async with asyncio.timeout(300):
        while status is None:
            status = await run.status()
    await run.reach_update(status.version.step + 5, 300)


async def _figures(
    run: LiveRun,
    first: learner_pb2.GetStatusResponse | None,
    answers: Answers,
    resources: ResourceLog,
    injected: int,
) -> dict[str, Any]:
    ids: Counter[str] = Counter()
    updates: list[int] = []
    request = learner_pb2.WatchMetricsRequest(no_follow=True, with_rollouts=True)
    async for answer in run.learner.WatchMetrics(request, timeout=120):
        updates.append(int(answer.metrics.step))
        ids.update(answer.metrics.rollout_ids)
    status = await run.status()
    accounts: dict[str, int] = {}
    alarms: list[str] = []
    # What is in flight moves while the counters are read: the sum is taken when they agree, or as it stood at last.
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = await run.get_run()
        accounts, alarms = dict(found.accounts), list(found.alarms)
        if accounts and not unaccounted(accounts, injected):
            break
        await asyncio.sleep(0.2)
    growth = resources.growth()
    figures = {
        "updates": updates[-1] if updates else 0,
        "updates_in_order": updates == list(range(updates[0], updates[0] + len(updates))) if updates else False,
        "rollouts_trained": ids.total(),
        "rollouts_trained_twice": sum(1 for count in ids.values() if count > 1),
        "accounts": accounts,
        "unaccounted": unaccounted(accounts, injected),
        "answered": answers.ok,
        "answered_share": answers.share,
        "failed": dict(answers.failed),
        "slowest_answer_s": report.rounded(answers.slowest_s),
        "growth_memory": {name: report.rounded(grown.memory) for name, grown in growth.items()},
        "growth_files": {name: report.rounded(grown.files) for name, grown in growth.items()},
        "more_files": {name: report.rounded(grown.more_files) for name, grown in growth.items()},
        "poisoned": injected,
        "batches_skipped": status.batches_skipped if status else -1,
        "rollouts_undone": status.rollouts_undone if status else -1,
        "versions_refused": status.versions_refused if status else -1,
        "learner_restarted_from_fence": first.version.fence if first else 0,
        "fence": status.version.fence if status else 0,
        "alarms": alarms,
    }
    return {**figures, "missed": _missed(figures)}


def unaccounted(accounts: dict[str, int], injected: int) -> int:
    """Admitted rollouts that are nowhere; negative if some are counted twice.

    Args:
        accounts: `Run.accounts`.
        injected: rollouts that nobody admitted. Each is counted where it ended, beside the admitted ones; unless Redis lost
            something: what it lost is the rest that nobody knows of, and smaller by them.
    """
    missing = accounts.get("admitted", 0) - sum(count for name, count in accounts.items() if name != "admitted")
    return 0 if -injected <= missing <= 0 else missing


def _missed(figures: dict[str, Any]) -> list[str]:
    memory = [(name, value) for name, value in figures["growth_memory"].items() if value > GROWTH_BAR]
    # A connection more or less is chance where there are twenty.
    files = [(n, v) for n, v in figures["growth_files"].items() if v > GROWTH_BAR and figures["more_files"][n] >= FILES_BAR]
    grown = [f"memory of {name} grew to {value:g} of the middle third" for name, value in memory]
    grown += [f"open files of {name} grew to {value:g} of the middle third" for name, value in files]
    bars = [
        (figures["rollouts_trained_twice"] == 0, "rollouts trained twice"),
        (figures["updates_in_order"], "updates are missing or out of order"),
        (not figures["poisoned"] or figures["batches_skipped"] > 0, "a poisoned batch was not skipped"),
        (figures["unaccounted"] == 0, f"{figures['unaccounted']} rollouts are not accounted for"),
        (figures["answered_share"] >= ANSWERED_BAR, f"{figures['answered_share']:.4f} of the requests were answered"),
        (figures["updates"] > 0, "nothing was trained"),
    ]
    return [text for met, text in bars if not met] + grown


@asynccontextmanager
async def _beside(*work: Any) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()  # it runs until it is cancelled: that it ended is an error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def _disk(directory: Path) -> Iterator[bool]:
    """Makes the directory a small file system of its own; yields False where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "honed-soak", str(directory)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(directory)], check=False)


def main(
    minutes: Annotated[float, typer.Option(min=1, help="How long.")] = 45.0,
    kill_every: Annotated[float, typer.Option(min=5, help="Seconds between two kills.")] = 60.0,
    engine: Annotated[str, typer.Option(help="vllm, transformers or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the order of the faults and of the victims.")] = 1,
    logs: Annotated[Path | None, typer.Option(help="Where to copy the logs of the services at the end.")] = None,
) -> None:
    """A long run under chaos."""
    with scratch_directory() as root, _disk(root) as own_disk:
        try:
            figures = asyncio.run(soak(root, minutes, kill_every, engine, seed, own_disk=own_disk))
        finally:
            if logs is not None:
                shutil.copytree(root / "run" / "logs", logs, dirs_exist_ok=True)
                for name in ("up.log", "resources.csv"):
                    with contextlib.suppress(FileNotFoundError):
                        shutil.copy(root / name, logs)
    figures["full_disk"] = own_disk
    print("\n".join(figures.pop("log")))
    report.finish(figures)
    if figures["missed"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
