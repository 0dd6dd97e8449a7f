"""What vLLM in bfloat16 can and cannot be fooled with, and how it starts; one engine for all, on a model with a tied head."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.contract.engines.conftest import Lab
from tests.support.tiny import load, make_canaries, make_tiny_model, publish_version

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.generation.engine import InitialVersion
from honed.generation.requests import Sampling
from honed.kit.errors import Aborted, FailedPrecondition, Unavailable

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.vllm]

STEP = 8e-4
"""Standard deviation of what is added to each weight: the canaries move by less than the tolerance, and more than the noise."""


def step_from(model: Path, directory: Path) -> Path:
    """The model after one small step."""
    import torch

    stepped = load(model)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stepped.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=chance), alpha=STEP)
    make_tiny_model(directory, 0, tied=True)  # for the tokenizer
    stepped.save_pretrained(directory)
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """Started where the three newest versions cannot be served."""
    from honed.generation.vllm.engine import VLLMEngine, VLLMSettings

    root = tmp_path_factory.mktemp("bfloat16")
    base = make_tiny_model(root / "base", 0, spread=0.05, tied=True)
    other = make_tiny_model(root / "other", 1, spread=0.05, tied=True)
    models = [base, step_from(base, root / "step"), other]
    store = PolicyStore(root / "store", "test")
    canaries = [make_canaries(model, 2, 48) for model in models]
    for step, (weights, said) in enumerate([(0, 0), (0, 2), (2, 0), (0, 0)]):
        publish_version(store, models[weights], VersionId(1, step), canaries=canaries[said])
    directories = [store.fetch(VersionId(1, step), root / "cache") for step in range(4)]
    (directories[3] / "model.safetensors").write_bytes(b"damaged")
    versions = [InitialVersion(VersionId(1, step), directories[step]) for step in (3, 2, 1, 0)]
    engine = VLLMEngine(versions, VLLMSettings(dtype="bfloat16", max_num_seqs=16))
    with pytest.raises(Unavailable):
        _ = engine.version
    await engine.start()
    lab = Lab(engine, store, root, models)
    lab.canaries = dict(enumerate(canaries))
    for _ in range(4):
        next(lab.steps)
    yield lab
    await engine.close()


async def test_one_process_walks_back_to_the_newest_version_that_passes(lab: Lab) -> None:
    assert lab.engine.version == VersionId(1, 0)
    assert list(lab.engine.refused) == [VersionId(1, 3), VersionId(1, 2), VersionId(1, 1)]
    assert "model.safetensors" in lab.engine.refused[VersionId(1, 3)]
    assert all("canaries of version" in lab.engine.refused[VersionId(1, step)] for step in (1, 2))
    chunk = await lab.engine.complete(lab.request([5, 6], Sampling(4, fixed_length=True)))
    assert [span.version for span in chunk.spans] == [VersionId(1, 0)]


async def test_one_small_step_passes_and_is_told_from_the_version_before(lab: Lab) -> None:
    assert lab.engine._vllm.unstaged_because == ""  # type: ignore[attr-defined]
    for model in (1, 0, 1):
        report = await lab.push(model)
        assert report.canary_max_error < 0.1
        assert report.canaries_tell_apart is True


@pytest.fixture
def idle(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has vLLM's workers ignore a call."""
    llm: Any = lab.engine._vllm._llm  # type: ignore[attr-defined]
    honest = llm.collective_rpc

    def ignore(method: str) -> None:
        async def rpc(name: str, *args: Any, **kwargs: Any) -> Any:
            return [None] if name == method else await honest(name, *args, **kwargs)

        monkeypatch.setattr(llm, "collective_rpc", rpc)

    return ignore


@pytest.mark.parametrize("call", ["honed_exchange", "honed_load"])
async def test_a_load_that_does_nothing_is_refused_although_its_canaries_are_within_the_tolerance(
    lab: Lab, idle: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    await lab.push(0)
    before = lab.engine.version
    version, directory = lab.publish(1)
    if call == "honed_load":
        monkeypatch.setattr(lab.engine._vllm, "unstaged_because", "a test")  # type: ignore[attr-defined]
    await lab.engine.prepare(version, directory)
    idle(call)
    with pytest.raises(Aborted, match="changed nothing"):
        await lab.engine.commit(version)
    assert lab.engine.version == before
    monkeypatch.undo()
    assert (await lab.push(1)).canaries_tell_apart is True


async def test_the_weights_of_the_version_before_are_refused_under_a_new_name(lab: Lab) -> None:
    await lab.push(1)
    await lab.push(0)
    version, directory = lab.publish(0, canaries_of=1)
    await lab.engine.prepare(version, directory)
    with pytest.raises(Aborted, match=r"changed nothing|fit .* better"):
        await lab.engine.commit(version)


async def test_a_prepare_that_is_given_up_or_fails_leaves_nothing_behind(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, staging = lab.engine._vllm.stage, asyncio.Event()  # type: ignore[attr-defined]

    async def without_end(ticket: int, directory: Path, files: Any) -> None:
        staging.set()
        await stage(ticket, directory, files)
        await asyncio.Event().wait()

    monkeypatch.setattr(lab.engine._vllm, "stage", without_end)  # type: ignore[attr-defined]
    version, directory = lab.publish(1)
    preparing = asyncio.create_task(lab.engine.prepare(version, directory))
    await staging.wait()
    preparing.cancel()
    await asyncio.wait([preparing])
    monkeypatch.undo()
    with pytest.raises(FailedPrecondition, match="not prepared"):
        await lab.engine.commit(version)
    version, directory = lab.publish(1)

    async def from_elsewhere(ticket: int, directory: Path, files: Any) -> None:
        await stage(ticket, directory / "nowhere", files)

    monkeypatch.setattr(lab.engine._vllm, "stage", from_elsewhere)  # type: ignore[attr-defined]
    with pytest.raises(Unavailable, match="cannot be loaded"):
        await lab.engine.prepare(version, directory)
    monkeypatch.undo()
    assert (await lab.push(1)).version == lab.engine.version
