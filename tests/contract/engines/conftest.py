"""Both engines behind the port, each started once, and versions to push into them."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from tests.support.tiny import load, make_canaries, make_tiny_model, publish_version

from honed.artifacts.manifest import Canary
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.generation.engine import CommitReport, GenerationEngine, InitialVersion
from honed.generation.gate import RequestGate
from honed.generation.requests import Chunk, EngineRequest, Sampling

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MAX_BATCH = 16
MAX_IN_FLIGHT = 96


@dataclass
class Lab:
    """An engine, a store of versions for it, and the models behind them."""

    engine: GenerationEngine
    store: PolicyStore
    root: Path
    models: list[Path]
    steps: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    ids: itertools.count[int] = field(default_factory=itertools.count)
    weights: dict[VersionId, int] = field(default_factory=lambda: {VersionId(1, 0): 0})
    canaries: dict[int, tuple[Canary, ...]] = field(default_factory=dict)
    loaded: dict[int, LlamaForCausalLM] = field(default_factory=dict)

    def canaries_of(self, model: int) -> tuple[Canary, ...]:
        if model not in self.canaries:
            self.canaries[model] = make_canaries(self.models[model])
        return self.canaries[model]

    def publish(self, model: int, *, canaries_of: int | None = None) -> tuple[VersionId, Path]:
        """A new version with the weights of `model`; with the canaries of another one, a push of it must fail."""
        version = VersionId(1, next(self.steps))
        canaries = self.canaries_of(model if canaries_of is None else canaries_of)
        publish_version(self.store, self.models[model], version, canaries=canaries)
        self.weights[version] = model
        return version, self.store.fetch(version, self.root / "cache")

    async def push(self, model: int) -> CommitReport:
        version, directory = self.publish(model)
        await self.engine.prepare(version, directory)
        return await self.engine.commit(version)

    def request(self, prompt: list[int], sampling: Sampling, **kwargs: bool) -> EngineRequest:
        return EngineRequest(f"test-{next(self.ids)}", prompt, sampling, **kwargs)

    def model(self, version: VersionId) -> LlamaForCausalLM:
        """The labelled version under transformers in float32."""
        index = self.weights[version]
        if index not in self.loaded:
            self.loaded[index] = load(self.models[index])
        return self.loaded[index]


def together(chunks: list[Chunk]) -> Chunk:
    """A stream's chunks as one."""
    return Chunk(
        token_ids=tuple(t for c in chunks for t in c.token_ids),
        logprobs=tuple(p for c in chunks for p in c.logprobs),
        spans=tuple(s for c in chunks for s in c.spans),
        text="".join(c.text for c in chunks),
        finish_reason=chunks[-1].finish_reason,
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [make_tiny_model(root / str(seed), seed) for seed in range(3)]


def make_engine(kind: str, initial: InitialVersion, max_model_len: int | None = None) -> GenerationEngine:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    gate = RequestGate(MAX_IN_FLIGHT, MAX_IN_FLIGHT + 1, application_share=1.0)
    if kind == "vllm":
        from honed.generation.vllm.engine import VLLMEngine, VLLMSettings

        os.environ["CXX"] = "/no/compiler"  # container images have none
        settings = VLLMSettings(max_num_seqs=MAX_BATCH, max_model_len=max_model_len)
        return VLLMEngine(initial, settings, gate=gate)
    from honed.generation.hf.engine import TransformersEngine, TransformersSettings

    return TransformersEngine(initial, TransformersSettings(max_batch=MAX_BATCH), gate=gate)


@pytest_asyncio.fixture(
    scope="session", loop_scope="session", params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)]
)
async def lab(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: list[Path]
) -> AsyncIterator[Lab]:
    root = tmp_path_factory.mktemp(request.param)
    store = PolicyStore(root / "store", "test")
    first = VersionId(1, 0)
    publish_version(store, models[0], first)
    engine = make_engine(request.param, InitialVersion(first, store.fetch(first, root / "cache")), 512)
    await engine.start()
    yield Lab(engine, store, root, models)
    await engine.close()


@pytest_asyncio.fixture(loop_scope="session", autouse=True)
async def nothing_left_in_flight(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Every test leaves the engine as it found it."""
    yield
    if "lab" in request.fixturenames:
        assert request.getfixturevalue("lab").engine.in_flight == 0
