"""What a long run costs a learner: its start, its memory and its status after 100,000 updates, against an empty one.

Method. A journal of `--updates` updates with `--rollouts` rollouts each is made, not trained, in the files' own format, with a
push for each update, the set of all rollouts that trained, and a checkpoint of the last update. Then the real learner process
(`honed serve learner`) is started in that directory and in an empty one, with the same tiny model, on a real redis-server:

* ready: from the start of the process to the first answer that it waits for rollouts; the median over `--turns` of each.
* memory: the peak of the resident set until then.
* status: p95 of GetStatus over the gRPC service with a token, one call after another.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import grpc
import typer
import yaml

from honed.artifacts.draft import VersionDraft
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.kit.tokens import ensure_local_tokens
from honed.learner.build import build_trainer
from honed.learner.loop.checkpoint import CheckpointStore
from honed.learner.loop.checkpoint_files import Checkpoint, Progress
from honed.learner.loop.exporter import Exporter
from honed.learner.loop.segments import ROWS, encoded
from honed.learner.sources.trained import TrainedIds
from honed.queue.embedded import EmbeddedRedis, free_port
from honed.runtime import internal_channel
from honed.v1 import learner_pb2, learner_pb2_grpc
from honed.workspace import Workspace
from loadtest import report
from loadtest.material import LONGEST, make_model
from loadtest.scratch import scratch_directory

START_TIMEOUT_S: Final = 120.0
MOST_MORE_S, MOST_MORE_MB, MOST_STATUS_MS = 5.0, 100.0, 5.0
_METRICS: Final = 32


@dataclass(frozen=True)
class Measured:
    """One start of a learner.

    Attributes:
        ready_s: Seconds until it waited for rollouts.
        peak_mb: The most memory that it held until then.
        status_ms: Durations of GetStatus calls.
        trained: Rollouts that it says have trained.
    """

    ready_s: float
    peak_mb: float
    status_ms: list[float]
    trained: int


def settings_of(root: Path, run: str) -> RunSettings:
    """A run of its own directory, store and ports."""
    return RunSettings.model_validate(
        {
            "run": run,
            "directory": str(root / run),
            "generation": {"max_model_tokens": LONGEST, "max_prompt_tokens": LONGEST // 2},
            "learner": {"port": free_port(), "steps": None, "batch": 256, "journal_mb": 4096},
        }
    )


def publish_base(settings: RunSettings, model: Path) -> PolicyStore:
    """A policy store with the base version."""
    import torch

    from honed.learner.models.policy import PolicyModel
    from honed.models.loader import load_language_model

    store = PolicyStore(settings.policy_url, settings.run)
    policy = PolicyModel(load_language_model(model, device=torch.device("cpu")))
    directory, canaries = Exporter(policy, model, settings.directory / "scratch").export(VersionId(0, 0))
    store.publish(directory, VersionDraft(VersionId(0, 0), canaries))
    return store


def make_journal(home: Path, run: str, updates: int, rollouts: int) -> int:
    """Writes the journal; returns its bytes."""
    written = 0
    values = {f"metric_{number}": number + 1 / 3 for number in range(_METRICS)}
    for name in ("updates", "pushes"):
        (home / "journal" / name).mkdir(parents=True)
    for first in range(1, updates + 1, ROWS):
        numbers = range(first, min(first + ROWS, updates + 1))
        before = (first - 1) * rollouts
        rows = (
            {
                "n": n,
                "at": 6.0 * n,
                "values": values,
                "ids": [f"{run}-{turn}/0" for turn in range((n - 1) * rollouts, n * rollouts)],
                "turn": n * rollouts,
            }
            for n in numbers
        )
        totals = {"trained": before, "undone": 0, "skipped": 0, "turn": before}
        pushes = (
            {
                "n": n, "version": f"1.{n}", "ended_at": 6.0 * n, "committed": 1, "failures": [], "pauses_s": [0.05],
                "canary_max_error": 1e-6, "carried": 3, "refused": False,
            }
            for n in numbers
        )  # fmt: skip
        for kind, content in (
            ("updates", encoded(totals, rows)),
            ("pushes", encoded({"pushed": first - 1, "failed": 0, "refused": 0}, pushes)),
        ):
            (home / "journal" / kind / f"{first:012d}.jsonl").write_bytes(content)
            written += len(content)
    return written


def make_history(settings: RunSettings, store: PolicyStore, updates: int, rollouts: int) -> int:
    """Writes what a learner has after so many updates; returns the bytes of its journal."""
    home = Workspace(settings.directory).learner
    size = make_journal(home, settings.run, updates, rollouts)
    base = store.fetch(VersionId(0, 0), settings.directory / "scratch")
    trainer = build_trainer(settings, base)
    trainer.step = updates
    version = VersionId(1, updates)
    progress = Progress(TrainedIds.all_before(settings.run, updates * rollouts), version.label)
    CheckpointStore(home / "checkpoints").save(Checkpoint(trainer.state(), progress), 1)
    directory, canaries = Exporter(trainer.model, base, settings.directory / "scratch" / "export").export(version)
    store.publish(directory, VersionDraft(version, canaries))
    return size


@asynccontextmanager
async def learner_process(settings: RunSettings, redis_url: str, log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The learner as the launcher starts it; ended with the block."""
    file = settings.directory / "run.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True)))
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "honed.cli.main", "serve", "learner", "--run-file", str(file)),
            env={**os.environ, "HONED_QUEUE__URL": redis_url, "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def start(settings: RunSettings, redis_url: str, calls: int) -> Measured:
    """Starts the learner, waits until it waits for rollouts, and asks for its status so many times."""
    log = settings.directory / "learner.log"
    started = time.perf_counter()
    async with learner_process(settings, redis_url, log) as process:
        channel = internal_channel(settings, settings.learner.target)
        stub = learner_pb2_grpc.LearnerServiceStub(channel)
        status = learner_pb2.GetStatusResponse()
        while status.state != learner_pb2.LEARNER_STATE_WAITING:
            if process.returncode is not None or time.perf_counter() - started > START_TIMEOUT_S:
                raise RuntimeError(f"the learner did not start; its log ends with {log.read_text()[-1000:]!r}")
            try:
                status = await stub.GetStatus(learner_pb2.GetStatusRequest(), timeout=1)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.02)
        ready_s = time.perf_counter() - started
        peak_mb = _peak_mb(process.pid)
        durations = []
        for _ in range(calls):
            before = time.perf_counter()
            status = await stub.GetStatus(learner_pb2.GetStatusRequest(), timeout=5)
            durations.append((time.perf_counter() - before) * 1e3)
        await channel.close()
    return Measured(ready_s, peak_mb, durations, status.rollouts_trained)


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


async def measure(root: Path, updates: int, rollouts: int, turns: int, calls: int) -> dict[str, object]:
    """All figures."""
    model = root / "model"
    make_model(model, width=64, layers=2)
    empty, endless = settings_of(root, "empty"), settings_of(root, "endless")
    for settings in (empty, endless):
        ensure_local_tokens(settings.tokens_directory)
    publish_base(empty, model)
    began = time.perf_counter()
    size = make_history(endless, publish_base(endless, model), updates, rollouts)
    made_s = time.perf_counter() - began
    found: dict[str, list[Measured]] = {"empty": [], "endless": []}
    async with EmbeddedRedis(root / "redis") as url:
        for _ in range(turns):
            for settings in (empty, endless):
                found[settings.run].append(await start(settings, url, calls))
    if {each.trained for each in found["endless"]} != {updates * rollouts}:
        raise RuntimeError(f"the learner counts {[each.trained for each in found['endless']]} rollouts")
    ready = {name: statistics.median(each.ready_s for each in starts) for name, starts in found.items()}
    peak = {name: statistics.median(each.peak_mb for each in starts) for name, starts in found.items()}
    status_ms = _p95([ms for each in found["endless"] for ms in each.status_ms])
    more_s, more_mb = ready["endless"] - ready["empty"], peak["endless"] - peak["empty"]
    return {
        "updates": updates,
        "rollouts": updates * rollouts,
        "journal_mb": round(size / 2**20),
        "made_s": round(made_s, 1),
        "ready_s": round(ready["endless"], 2),
        "ready_empty_s": round(ready["empty"], 2),
        "more_s": round(more_s, 2),
        "peak_mb": round(peak["endless"], 1),
        "more_mb": round(more_mb, 1),
        "status_p95_ms": round(status_ms, 2),
        "ok": more_s <= MOST_MORE_S and more_mb <= MOST_MORE_MB and status_ms <= MOST_STATUS_MS,
    }


def main(
    updates: Annotated[int, typer.Option(min=1, help="Updates behind the learner.")] = 100_000,
    rollouts: Annotated[int, typer.Option(min=1, help="Rollouts of each.")] = 260,
    turns: Annotated[int, typer.Option(min=1, help="Starts of each learner.")] = 2,
    calls: Annotated[int, typer.Option(min=2, help="GetStatus calls of each start.")] = 300,
) -> None:
    """Compares a learner with a long history with one that has none."""
    with scratch_directory() as root:
        figures = asyncio.run(measure(root, updates, rollouts, turns, calls))
    bars = {"more_s": MOST_MORE_S, "more_mb": MOST_MORE_MB, "status_p95_ms": MOST_STATUS_MS}
    rows = [(name, str(figures[name]), f"{bar:g}") for name, bar in bars.items()]
    report.show(report.figures_table(f"{updates:,} updates, {updates * rollouts:,} rollouts", ["", "measured", "bar"], rows))
    report.finish(figures)
    if not figures["ok"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
