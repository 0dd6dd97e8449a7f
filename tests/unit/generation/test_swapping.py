"""Claims about the start of an engine, and about how vLLM's host comes to new weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from honed.artifacts.manifest import Canary, Manifest
from honed.artifacts.version import VersionId
from honed.generation import swapping
from honed.generation.candidate import Candidate
from honed.generation.engine import CommitSettings, InitialVersion
from honed.generation.requests import Chunk, FinishReason
from honed.generation.swap import VersionSwap, WeightHost
from honed.generation.swapping import SwappingEngine
from honed.generation.vllm.engine import VLLMHost
from honed.kit.errors import Aborted, DataLoss, DeadlineExceeded, FailedPrecondition, HonedError, Unavailable

V1, V2, V3 = (VersionId(1, step) for step in (1, 2, 3))


def candidate(version: VersionId, tokenizer: str = "0" * 64) -> Candidate:
    canary = Canary((4, 5, 6), 1, (-1.0, -1.0 - version.step))
    return Candidate(Path("/nowhere"), Manifest("test", version, (), (), (canary,), tokenizer))


class Host:
    """Reads the canaries of what is loaded, off by what `errors` says."""

    def __init__(self, loaded: VersionId, errors: Mapping[VersionId, float]) -> None:
        self.loaded, self.errors, self.halted = loaded, errors, ""

    async def freeze(self) -> None: ...
    async def thaw(self) -> None: ...
    async def unstage(self) -> None: ...
    async def stage(self, candidate: Candidate) -> None: ...

    async def load(self, candidate: Candidate) -> None:
        self.loaded = candidate.version

    async def canary_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[-1.0, -1.0 - self.loaded.step + self.errors.get(self.loaded, 0.0)] for _ in prompts]

    async def halt(self, reason: str) -> None:
        self.halted = reason


class Engine(SwappingEngine):
    """Counts how often something is launched."""

    def __init__(self, initial: Any, errors: Mapping[VersionId, float]) -> None:
        super().__init__(initial, CommitSettings(1e-3), dtype="float32")
        self.launched: list[VersionId] = []
        self.host: Host | None = None
        self.errors = errors
        self.stopped = 0

    async def _launch(self, candidate: Candidate) -> WeightHost:
        self.launched.append(candidate.version)
        self.host = Host(candidate.version, self.errors)
        return self.host

    async def _stop(self) -> None:
        self.stopped += 1

    def _swapping(self, swap: VersionSwap) -> None: ...

    @property
    def progress(self) -> int:
        return 0

    @property
    def _tokenizer(self) -> Any:
        raise NotImplementedError


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """An engine on candidates, newest first; those in `wrong` have other faults than their canaries."""

    def make(
        *versions: VersionId, errors: Mapping[VersionId, float] | None = None, wrong: Mapping[VersionId, object] | None = None
    ) -> Engine:
        faults = wrong or {}

        def read(version: VersionId, directory: Path) -> Candidate:
            fault = faults.get(version)
            if isinstance(fault, HonedError):
                raise fault
            return candidate(version, "1" * 64 if fault == "tokenizer" else "0" * 64)

        monkeypatch.setattr(swapping, "read_candidate", read)
        return Engine([InitialVersion(version, Path("/nowhere")) for version in versions], errors or {})

    return make


async def test_a_start_walks_back_in_one_process_to_the_newest_version_that_passes(make: Callable[..., Engine]) -> None:
    engine = make(VersionId(1, 5), VersionId(1, 4), V3, V2, V1, errors={VersionId(1, 4): 0.5, V3: 0.5},
                  wrong={VersionId(1, 5): DataLoss("model.safetensors: sha256 differs")})  # fmt: skip
    await engine.start()
    assert engine.version == V2
    assert engine.launched == [VersionId(1, 4)]
    assert list(engine.refused) == [VersionId(1, 5), VersionId(1, 4), V3]
    assert "sha256 differs" in engine.refused[VersionId(1, 5)]
    assert "canaries of version 1.4" in engine.refused[VersionId(1, 4)]
    assert engine.disagreeing == {VersionId(1, 4), V3}
    async with engine._gate.enter():
        pass


async def test_a_version_that_does_not_fit_what_is_loaded_is_passed_over(make: Callable[..., Engine]) -> None:
    engine = make(V3, V2, V1, errors={V3: 1.0}, wrong={V2: "tokenizer"})
    await engine.start()
    assert engine.version == V1
    assert "another tokenizer" in engine.refused[V2]


async def test_a_start_fails_only_if_no_version_passes_and_names_each_reason(make: Callable[..., Engine]) -> None:
    engine = make(V2, V1, errors={V2: 1.0}, wrong={V1: FailedPrecondition("version 1.1 has no canaries")})
    with pytest.raises(Aborted, match=r"no version can be served\. 1\.2: the canaries .*; 1\.1: version 1\.1 has no canaries"):
        await engine.start()
    assert engine.host is not None
    assert engine.host.halted
    assert engine.stopped
    with pytest.raises(FailedPrecondition, match="no version to start with"):
        await make().start()


async def test_what_is_not_a_versions_fault_ends_the_start(make: Callable[..., Engine]) -> None:
    engine = make(V2, V1, wrong={V2: Unavailable("the store does not answer")})
    with pytest.raises(Unavailable, match="the store does not answer"):
        await engine.start()
    assert engine.refused == {}


async def test_a_version_is_fetched_only_when_its_turn_comes(make: Callable[..., Engine]) -> None:
    fetched: list[str] = []

    def fetch(name: str) -> Callable[[], Path]:
        def fetching() -> Path:
            fetched.append(name)
            if name == "third":
                raise DataLoss("the store's copy is damaged")
            return Path("/nowhere")

        return fetching

    def versions() -> Iterator[InitialVersion]:
        for version, name in ((V3, "third"), (V2, "second"), (V1, "first")):
            yield InitialVersion(version, fetch(name))

    engine = make()
    engine._initial = versions()
    await engine.start()
    assert engine.version == V2
    assert fetched == ["third", "second"]
    assert engine.refused == {V3: "the store's copy is damaged"}


async def test_an_engine_that_has_not_started_says_that_nothing_serves(make: Callable[..., Engine]) -> None:
    engine = make(V1)
    for call in (engine.prepare(V1, Path("/nowhere")), engine.commit(V1), engine.abort_version(V1), engine.pause()):
        with pytest.raises(Unavailable, match="not started"):
            await call
    with pytest.raises(Unavailable, match="not started"):
        _ = engine.version


async def test_the_time_of_a_response_stands_still_while_the_gate_is_shut(make: Callable[..., Engine]) -> None:
    """A pause of ten minutes by an operator failed all that was in flight, and cost each training prompt a delivery."""
    engine, answer = make(V1), Chunk((7,), (), (), "", FinishReason.LENGTH)
    engine._request_timeout_s = 0.02

    async def wait() -> Chunk:
        if engine._gate.is_shut:
            await asyncio.Event().wait()
        return answer

    waiting = asyncio.create_task(engine._in_time(wait))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done, "it has not started, so the gate is shut"
    await engine.start()
    assert await waiting is answer
    with pytest.raises(DeadlineExceeded, match=r"within 0\.02 s \(generation\.request_timeout_s\)"):
        await engine._in_time(asyncio.Event().wait)  # type: ignore[arg-type]


class FakeVLLM:
    """Notes what it is asked to do."""

    unstaged_because = ""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fault: BaseException | asyncio.Event | None = None

    async def stage(self, ticket: int, directory: Path, files: Sequence[str]) -> None:
        await self._note("stage")

    async def unstage(self) -> None:
        self.calls.append("unstage")

    async def exchange(self, ticket: int, label: str) -> None:
        await self._note(f"exchange {label}")

    async def load(self, directory: Path, files: Sequence[str], label: str) -> None:
        await self._note(f"load {label}")

    async def relabel(self, label: str) -> None:
        await self._note(f"relabel {label}")

    async def _note(self, call: str) -> None:
        self.calls.append(call)
        fault, self.fault = self.fault, None
        if isinstance(fault, asyncio.Event):
            await fault.wait()
        elif fault is not None:
            raise fault


@pytest.fixture
def vllm() -> FakeVLLM:
    return FakeVLLM()


@pytest.fixture
def host(vllm: FakeVLLM) -> VLLMHost:
    return VLLMHost(vllm, V1)  # type: ignore[arg-type]


async def test_a_staged_version_is_exchanged_and_so_is_the_roll_back(vllm: FakeVLLM, host: VLLMHost) -> None:
    await host.stage(candidate(V2))
    for version in (V2, V1, V2):
        await host.load(candidate(version))
    assert vllm.calls == ["stage", "exchange 1.2", "exchange 1.1", "exchange 1.2"]


async def test_what_is_loaded_already_is_only_labelled(vllm: FakeVLLM, host: VLLMHost) -> None:
    await host.load(candidate(V1))
    assert vllm.calls == ["relabel 1.1"]


async def test_without_a_second_set_the_files_are_read(vllm: FakeVLLM, host: VLLMHost) -> None:
    vllm.unstaged_because = "generation.staged_load is off"
    await host.stage(candidate(V2))
    await host.load(candidate(V2))
    await host.load(candidate(V1))
    await host.unstage()
    assert vllm.calls == ["load 1.2", "load 1.1"]


async def test_after_an_exchange_that_failed_only_the_files_are_trusted(vllm: FakeVLLM, host: VLLMHost) -> None:
    await host.stage(candidate(V2))
    vllm.fault = RuntimeError("half-way")
    with pytest.raises(RuntimeError):
        await host.load(candidate(V2))
    await host.load(candidate(V1))
    assert vllm.calls[1:] == ["exchange 1.2", "load 1.1"]


async def test_a_prepare_that_fails_or_is_given_up_frees_what_it_took(vllm: FakeVLLM, host: VLLMHost) -> None:
    vllm.fault = Unavailable("no memory")
    with pytest.raises(Unavailable):
        await host.stage(candidate(V2))
    vllm.fault = asyncio.Event()
    staging = asyncio.create_task(host.stage(candidate(V2)))
    await asyncio.sleep(0)
    staging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await staging
    assert vllm.calls == ["stage", "unstage", "stage", "unstage"]
    await host.load(candidate(V2))
    assert vllm.calls[-1] == "load 1.2"
