"""What is tracked, made for tests, and what trackers keep of it where the library has no reader."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from honed.learner.loop.journal import Journal
from honed.learner.loop.records import UpdateRecord
from honed.learner.service import LearnerService, LoadedLearner
from honed.tracking.port import UPDATES, Point, TrackedRun
from honed.tracking.start import ENVIRONMENT
from honed.v1 import common_pb2, learner_pb2, learner_pb2_grpc

RUN = TrackedRun("shop", 1_790_000_000.0, {"learner.steps": "16", "seed": "7"}, {"algorithm": "grpo"})
NONE: Any = None  # parts of a learner that nobody asks
_BLOCK = 32768


@pytest.fixture(autouse=True)
def tracker_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment in which trackers are loaded, and nobody's accounts; of each module that imports it."""
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


class JournalLearner:
    """The learner's own service over a journal."""

    def __init__(self, directory: Path) -> None:
        self.journal = Journal(directory)
        self.clock = 1_790_000_000.0
        self.target = ""

    async def train(self, step: int) -> None:
        self.clock += 1
        self.journal.add_update(UpdateRecord(step, self.clock, {"kl": step / 10}, [f"r-{step}/0"]))
        await self.journal.announce()

    async def go_back(self, step: int) -> None:
        self.journal.cut(step, self.journal.last - step, 0)
        await self.journal.announce()

    def status(self, step: int) -> learner_pb2.GetStatusResponse:
        """As the conductor knows it after an update."""
        return learner_pb2.GetStatusResponse(version=common_pb2.PolicyVersion(fence=1, step=step))

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.target)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        loaded: asyncio.Future[LoadedLearner] = asyncio.get_running_loop().create_future()
        loaded.set_result(LoadedLearner(NONE, self.journal, NONE, NONE))
        server = grpc.aio.server()
        learner_pb2_grpc.add_LearnerServiceServicer_to_server(LearnerService("r", None, NONE, loaded), server)
        self.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield
        finally:
            await server.stop(None)


def update(step: int, *, again: int = 0, **values: float) -> Point:
    """An update of a second; `again`: made once more, so many seconds later."""
    return Point(UPDATES, step, 1_790_000_000_000 + 1000 * (step + again), {"kl": step / 10, **values})


def offline_records(directory: Path) -> Iterator[Any]:
    """The records of the one offline run of wandb in a directory: a log of LevelDB's form, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (file,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := _BLOCK - at % _BLOCK) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def finished_records(directory: Path) -> list[Any]:
    """The same of a run that has been finished: wandb writes on in a process of its own."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = list(offline_records(directory))
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.05)
    raise AssertionError("the run is not finished")


def history(record: Any) -> dict[str, Any]:
    """What one row logs."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
