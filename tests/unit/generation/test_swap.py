"""Claims about the transaction of a push, over an engine that fails where it is told to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from honed.artifacts.manifest import Canary, FileEntry, Manifest
from honed.artifacts.version import VersionId
from honed.generation import swap as swap_module
from honed.generation.candidate import Candidate
from honed.generation.engine import CommitSettings
from honed.generation.gate import RequestGate
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
        self.staged: VersionId | None = None
        self.frozen = False
        self.halted = ""
        self.sampled_by: list[VersionId] = []

    async def freeze(self) -> None:
        await self._note("freeze")
        self.frozen = True

    async def stage(self, candidate: Candidate) -> None:
        await self._note(f"stage {candidate.version}")
        self.staged = candidate.version

    async def unstage(self) -> None:
        self.staged = None
        await self._note("unstage")

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
def gate() -> RequestGate:
    return RequestGate(8, 10, application_share=0.75)


@pytest.fixture
async def fresh(host: FakeHost, gate: RequestGate, monkeypatch: pytest.MonkeyPatch) -> VersionSwap:
    """Nothing serves yet."""
    monkeypatch.setattr(swap_module, "read_candidate", lambda version, directory: candidate(version))
    clock = itertools.count()
    return VersionSwap(host, candidate(OLD), gate, CommitSettings(1e-3, 0.2, 0.5), lambda: float(next(clock)))


@pytest.fixture
async def swap(fresh: VersionSwap, host: FakeHost) -> VersionSwap:
    """`OLD` serves, `NEW` is prepared."""
    await fresh.start(candidate(OLD))
    await fresh.prepare(NEW, Path("/nowhere"))
    assert host.sampled_by == [OLD]
    host.calls.clear()
    host.sampled_by.clear()
    return fresh


async def test_the_host_goes_on_only_after_the_canaries_passed(host: FakeHost, swap: VersionSwap) -> None:
    report = await swap.commit(NEW)
    assert host.calls == ["freeze", "load 1.2", "canary 1.2", "unstage", "thaw"]
    assert swap.version == report.version == NEW
    assert report.pause_s == 1.0


async def test_the_first_version_is_checked_before_the_door_opens(
    host: FakeHost, fresh: VersionSwap, gate: RequestGate
) -> None:
    host.broken["error 1.1"] = 0.5
    with pytest.raises(Aborted, match=r"off by 0\.5"):
        await fresh.start(candidate(OLD))
    assert host.sampled_by == []
    assert gate._shut


async def test_a_first_version_that_is_refused_makes_way_for_another(host: FakeHost, fresh: VersionSwap) -> None:
    host.broken["error 1.1"] = 0.5
    with pytest.raises(Aborted):
        await fresh.start(candidate(OLD))
    await fresh.start(candidate(VersionId(1, 0)))
    assert fresh.version == VersionId(1, 0)
    assert host.sampled_by == [VersionId(1, 0)]


async def test_before_the_first_version_has_passed_nothing_is_prepared_committed_or_said_to_serve(
    host: FakeHost, fresh: VersionSwap
) -> None:
    go_on = asyncio.Event()
    host.broken["canary 1.1"] = go_on
    starting = asyncio.create_task(fresh.start(candidate(OLD)))
    while "canary 1.1" not in host.calls:
        await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="no version serves yet"):
        _ = fresh.version
    with pytest.raises(Unavailable, match="no version serves yet"):
        await fresh.prepare(NEW, Path("/nowhere"))
    commit = asyncio.create_task(fresh.commit(OLD))  # waits for the lock: the start is a transaction like any other
    await asyncio.sleep(0)
    assert host.calls == ["freeze", "load 1.1", "canary 1.1"]
    go_on.set()
    await starting
    with pytest.raises(FailedPrecondition, match="not prepared"):
        await commit
    assert host.calls == ["freeze", "load 1.1", "canary 1.1", "thaw"]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"freeze": asyncio.Event()}, Unavailable),
        ({"load 1.2": RuntimeError("no memory")}, Unavailable),
        ({"load 1.2": asyncio.Event()}, Unavailable),
        ({"canary 1.2": Unavailable("no answer")}, Unavailable),
        ({"canary 1.2": asyncio.Event()}, Unavailable),
        ({"error 1.2": 0.002}, Aborted),
        ({"error 1.2": float("nan")}, Aborted),
        ({"error 1.2": float("-inf")}, Aborted),
    ],
    ids=["freeze hangs", "load fails", "load hangs", "canary fails", "canary hangs", "off", "nan", "inf"],
)
async def test_whatever_fails_the_old_version_serves_again_and_the_error_tells_a_bad_version_from_a_slow_engine(
    host: FakeHost, swap: VersionSwap, gate: RequestGate, fault: dict[str, object], error: type[HonedError]
) -> None:
    """The learner quarantines what is Aborted and rolls training back: a call over its deadline says nothing of the version."""
    host.broken = fault
    if isinstance(hanging := fault.get("freeze"), asyncio.Event):
        asyncio.get_running_loop().call_later(0.3, hanging.set)
    with pytest.raises(error, match=r"version 1\.2 did not take, 1\.1 serves"):
        await swap.commit(NEW)
    assert host.calls[-5:] == ["freeze", "load 1.1", "canary 1.1", "unstage", "thaw"]
    assert host.sampled_by == [OLD]
    assert swap.version == OLD
    async with gate.enter():
        pass
    with pytest.raises(FailedPrecondition, match=r"Its last commit was rolled back: .+"):
        await swap.commit(NEW)
    host.broken = {}
    await swap.prepare(NEW, Path("/nowhere"))
    assert (await swap.commit(NEW)).version == NEW


async def test_the_whole_has_a_deadline_too(host: FakeHost, swap: VersionSwap) -> None:
    swap._settings = CommitSettings(1e-3, 60.0, 0.05)
    host.broken["load 1.2"] = asyncio.Event()
    with pytest.raises(Unavailable, match=r"more than 0\.05 s"):
        await swap.commit(NEW)
    assert host.sampled_by == [OLD]


async def test_if_the_old_version_cannot_be_restored_nothing_is_ever_sampled_again(
    host: FakeHost, swap: VersionSwap, gate: RequestGate
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
        async with gate.enter():
            pass


async def test_a_host_that_cannot_go_on_is_dead(host: FakeHost, swap: VersionSwap) -> None:
    host.broken["thaw"] = Unavailable("no answer")
    with pytest.raises(HonedError):
        await swap.commit(NEW)
    assert "thaw" in await swap.wait_dead()


async def test_requests_wait_at_the_door_while_weights_change(host: FakeHost, swap: VersionSwap, gate: RequestGate) -> None:
    go_on = asyncio.Event()
    host.broken["load 1.2"] = go_on

    async def request() -> VersionId:
        async with gate.enter():
            return swap.version

    commit = asyncio.create_task(swap.commit(NEW))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    late = asyncio.create_task(request())
    await asyncio.sleep(0)
    assert not late.done()
    assert (gate.in_flight, gate.running) == (1, 0)
    go_on.set()
    assert (await commit).requests_carried == 0
    assert await late == NEW


async def test_a_commit_during_a_pause_leaves_the_pause(host: FakeHost, swap: VersionSwap, gate: RequestGate) -> None:
    await swap.pause()
    await swap.commit(NEW)
    assert host.frozen
    assert host.sampled_by == []
    assert gate._shut
    await swap.resume()
    assert host.sampled_by == [NEW]


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
    await swap.prepare(third, Path("/nowhere"))
    host.calls.clear()
    await asyncio.gather(swap.commit(NEW), swap.commit(third))
    assert host.calls == [
        *("freeze", "load 1.2", "canary 1.2", "unstage", "thaw"),
        *("freeze", "load 1.3", "canary 1.3", "unstage", "thaw"),
    ]


async def test_a_forgotten_version_is_freed_and_not_committed(host: FakeHost, swap: VersionSwap) -> None:
    await swap.forget(NEW)
    await swap.forget(NEW)
    assert host.calls == ["unstage"]
    with pytest.raises(FailedPrecondition, match="PrepareVersion"):
        await swap.commit(NEW)


async def test_a_load_that_did_nothing_is_refused_within_any_tolerance(host: FakeHost, swap: VersionSwap) -> None:
    swap._settings = CommitSettings(10.0, 0.2, 0.5)
    honest = host.load

    async def lazily(candidate: Candidate) -> None:
        if candidate.version == OLD:
            await honest(candidate)
        else:
            await host._note(f"load {candidate.version}")

    host.load = lazily  # type: ignore[method-assign]
    with pytest.raises(Aborted, match="the load changed nothing"):
        await swap.commit(NEW)
    assert (swap.version, host.sampled_by) == (OLD, [OLD])
    host.load = honest  # type: ignore[method-assign]
    await swap.prepare(NEW, Path("/nowhere"))
    assert (await swap.commit(NEW)).canaries_tell_apart is True


async def test_what_reads_weights_has_a_deadline_that_grows_with_their_size(host: FakeHost, swap: VersionSwap) -> None:
    swap._settings = CommitSettings(1e-3, 0.02, 0.02, load_bytes_per_s=1000.0)
    large = candidate(NEW)
    files = (FileEntry("model.safetensors", 5000, "0" * 64), FileEntry("tokenizer.json", 1 << 40, "0" * 64))
    swap._prepared[NEW] = Candidate(large.directory, replace(large.manifest, files=files))
    go_on = asyncio.Event()
    host.broken["load 1.2"] = go_on
    asyncio.get_running_loop().call_later(0.1, go_on.set)
    assert (await swap.commit(NEW)).version == NEW
    host.broken["stage 1.2"] = asyncio.Event()
    with pytest.raises(Unavailable, match=r"did not answer stage within 0\.02 s"):
        await swap.prepare(NEW, Path("/nowhere"))


async def test_a_second_set_that_cannot_be_freed_does_not_fail_the_push(host: FakeHost, swap: VersionSwap) -> None:
    host.broken["unstage"] = Unavailable("no answer")
    assert (await swap.commit(NEW)).version == NEW


async def test_nothing_is_staged_while_a_commit_may_still_need_the_old_weights(host: FakeHost, swap: VersionSwap) -> None:
    go_on = asyncio.Event()
    host.broken["canary 1.2"] = go_on
    commit = asyncio.create_task(swap.commit(NEW))
    while "canary 1.2" not in host.calls:
        await asyncio.sleep(0)
    third = asyncio.create_task(swap.prepare(VersionId(1, 3), Path("/nowhere")))
    while not swap._staging._waiters:  # type: ignore[attr-defined]
        await asyncio.sleep(0)
    assert "stage 1.3" not in host.calls
    go_on.set()
    await commit
    await third
    assert host.calls[-3:] == ["unstage", "thaw", "stage 1.3"]
