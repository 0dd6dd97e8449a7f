"""Claims about the transaction of a push, over an engine that fails where it is told to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from honed.artifacts import Canary, Manifest, VersionId
from honed.generation.admission import Admission
from honed.generation.candidate import Candidate
from honed.generation.engine import CommitSettings
from honed.generation.swap import VersionSwap
from honed.kit.errors import Aborted, FailedPrecondition, HonedError, Unavailable

OLD, NEW = VersionId(1, 1), VersionId(1, 2)


def candidate(version: VersionId) -> Candidate:
    canary = Canary((4, 5, 6), 1, (-1.0, -1.0 - version.step))
    return Candidate(Path("/nowhere"), Manifest("test", version, (), (), (canary, canary), "0" * 64))


class FakeHost:
    """Serves weights truthfully, unless `broken` names the call and the version."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.broken: dict[str, object] = {}
        self.loaded = OLD
        self.frozen = False
        self.halted = ""
        self.sampled_by: list[VersionId] = []

    async def freeze(self) -> None:
        await self._note("freeze")
        self.frozen = True

    async def load(self, candidate: Candidate) -> None:
        assert self.frozen
        self.loaded = candidate.version
        await self._note(f"load {candidate.version}")

    async def canary_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        assert self.frozen
        await self._note(f"canary {self.loaded}")
        error = self.broken.get(f"error {self.loaded}", 0.0)
        assert isinstance(error, float)
        return [[-1.0, -1.0 - self.loaded.step + error] for _ in prompts]

    async def thaw(self) -> None:
        await self._note("thaw")
        self.frozen = False
        self.sampled_by.append(self.loaded)

    async def halt(self, reason: str) -> None:
        self.halted = reason

    async def _note(self, call: str) -> None:
        self.calls.append(call)
        fault = self.broken.get(call)
        if isinstance(fault, asyncio.Event):
            await fault.wait()
        elif isinstance(fault, Exception):
            raise fault


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def admission() -> Admission:
    return Admission(10)


@pytest.fixture
async def swap(host: FakeHost, admission: Admission) -> VersionSwap:
    clock = itertools.count()
    swap = VersionSwap(host, candidate(OLD), admission, CommitSettings(1e-3, 0.2, 0.5), lambda: float(next(clock)))
    swap._prepared[NEW] = candidate(NEW)
    return swap


async def test_the_host_goes_on_only_after_the_canaries_passed(host: FakeHost, swap: VersionSwap) -> None:
    report = await swap.commit(NEW)
    assert host.calls == ["freeze", "load 1.2", "canary 1.2", "thaw"]
    assert swap.version == report.version == NEW
    assert report.pause_s == 1.0


async def test_the_first_version_is_checked_before_the_door_opens(
    host: FakeHost, swap: VersionSwap, admission: Admission
) -> None:
    host.broken["error 1.1"] = 0.5
    with pytest.raises(Aborted, match=r"off by 0\.5"):
        await swap.verify_first()
    assert host.sampled_by == []
    assert not admission._open.is_set()


@pytest.mark.parametrize(
    "fault",
    [
        {"load 1.2": RuntimeError("no memory")},
        {"load 1.2": asyncio.Event()},
        {"canary 1.2": Unavailable("no answer")},
        {"canary 1.2": asyncio.Event()},
        {"error 1.2": 0.002},
        {"error 1.2": float("nan")},
        {"error 1.2": float("-inf")},
    ],
    ids=["load fails", "load hangs", "canary fails", "canary hangs", "off", "nan", "inf"],
)
async def test_whatever_fails_the_old_version_serves_again(
    host: FakeHost, swap: VersionSwap, admission: Admission, fault: dict[str, object]
) -> None:
    host.broken = fault
    with pytest.raises(Aborted, match=r"version 1\.2 did not take, 1\.1 serves"):
        await swap.commit(NEW)
    assert host.calls[-4:] == ["freeze", "load 1.1", "canary 1.1", "thaw"]
    assert host.sampled_by == [OLD]
    assert swap.version == OLD
    async with admission.enter():
        pass
    with pytest.raises(FailedPrecondition):
        await swap.commit(NEW)


async def test_the_whole_has_a_deadline_too(host: FakeHost, admission: Admission) -> None:
    swap = VersionSwap(host, candidate(OLD), admission, CommitSettings(1e-3, 60.0, 0.05), lambda: 0.0)
    swap._prepared[NEW] = candidate(NEW)
    host.broken["load 1.2"] = asyncio.Event()
    with pytest.raises(Aborted, match=r"more than 0\.05 s"):
        await swap.commit(NEW)
    assert host.sampled_by == [OLD]


async def test_if_the_old_version_cannot_be_restored_nothing_is_ever_sampled_again(
    host: FakeHost, swap: VersionSwap, admission: Admission
) -> None:
    host.broken = {"error 1.2": 1.0, "load 1.1": RuntimeError("disk gone")}
    with pytest.raises(Unavailable, match="disk gone"):
        await swap.commit(NEW)
    assert host.sampled_by == []
    assert "disk gone" in await swap.wait_dead()
    assert "disk gone" in host.halted
    for call in (swap.commit(NEW), swap.pause(), swap.resume()):
        with pytest.raises(Unavailable):
            await call
    with pytest.raises(Unavailable, match="disk gone"):
        async with admission.enter():
            pass


async def test_a_host_that_cannot_go_on_is_dead(host: FakeHost, swap: VersionSwap) -> None:
    host.broken["thaw"] = Unavailable("no answer")
    with pytest.raises(HonedError):
        await swap.commit(NEW)
    assert "thaw" in await swap.wait_dead()


async def test_requests_wait_at_the_door_while_weights_change(host: FakeHost, swap: VersionSwap, admission: Admission) -> None:
    await swap.verify_first()
    go_on = asyncio.Event()
    host.broken["load 1.2"] = go_on

    async def request() -> VersionId:
        async with admission.enter():
            return swap.version

    commit = asyncio.create_task(swap.commit(NEW))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    late = asyncio.create_task(request())
    await asyncio.sleep(0)
    assert not late.done()
    assert (admission.in_flight, admission.running) == (1, 0)
    go_on.set()
    assert (await commit).requests_carried == 0
    assert await late == NEW


async def test_a_commit_during_a_pause_leaves_the_pause(host: FakeHost, swap: VersionSwap, admission: Admission) -> None:
    await swap.verify_first()
    await swap.pause()
    await swap.commit(NEW)
    assert host.frozen
    assert host.sampled_by == [OLD]
    assert not admission._open.is_set()
    await swap.resume()
    assert host.sampled_by == [OLD, NEW]


async def test_a_cancelled_commit_runs_to_its_end(host: FakeHost, swap: VersionSwap) -> None:
    go_on = asyncio.Event()
    host.broken["load 1.2"] = go_on
    commit = asyncio.create_task(swap.commit(NEW))
    while "load 1.2" not in host.calls:
        await asyncio.sleep(0)
    commit.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await commit
    assert swap.version == NEW
    assert (await swap.commit(NEW)).version == NEW


async def test_two_commits_run_one_after_the_other(host: FakeHost, swap: VersionSwap) -> None:
    third = VersionId(1, 3)
    swap._prepared[third] = candidate(third)
    await asyncio.gather(swap.commit(NEW), swap.commit(third))
    assert host.calls == [
        *("freeze", "load 1.2", "canary 1.2", "thaw"),
        *("freeze", "load 1.3", "canary 1.3", "thaw"),
    ]


async def test_a_forgotten_version_is_not_committed(swap: VersionSwap) -> None:
    swap.forget(NEW)
    swap.forget(NEW)
    with pytest.raises(FailedPrecondition, match="PrepareVersion"):
        await swap.commit(NEW)
