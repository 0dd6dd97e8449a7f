"""Both engines sample and push every family that honed promises; vLLM here two of them, for it takes 25 s a start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.engines.conftest import make_engine
from tests.support.families import FAMILIES, make_family_model
from tests.support.tiny import token_logprobs

from honed.artifacts.draft import VersionDraft
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.generation.engine import GenerationEngine, InitialVersion
from honed.generation.requests import EngineRequest, FinishReason, Sampling
from honed.learner.loop.exporter import Exporter
from honed.learner.models.policy import PolicyModel
from honed.models.loader import load_language_model

PROMPT = [2 + 3 * i for i in range(20)]  # longer than Gemma's sliding window here, and so is the response
ENDS = list(range(100, 200))  # chat models name several tokens that end a response, in generation_config.json alone
TOLERANCE = 1e-4


def publish(store: PolicyStore, root: Path, family: str, version: VersionId) -> Any:
    """Publishes another random model as the learner does; returns it under transformers' reference attention."""
    from transformers import AutoModelForCausalLM

    base = make_family_model(root / f"{family}-{version.step}", family, seed=version.step)
    generation = base / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "eos_token_id": ENDS}))
    directory, canaries = Exporter(PolicyModel(load_language_model(base)), base, root / "export").export(version)
    store.publish(directory, VersionDraft(version, canaries))
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


async def sampled_truly(engine: GenerationEngine, model: Any, version: VersionId) -> None:
    request = EngineRequest(f"family-{version.step}", PROMPT, Sampling(30, temperature=0.8, seed=3, fixed_length=True))
    chunk = await engine.complete(request)
    assert [span.version for span in chunk.spans] == [version]
    own = token_logprobs(model, [*PROMPT, *chunk.token_ids], 0.8)[len(PROMPT) - 1 :]
    assert chunk.logprobs == pytest.approx(own, abs=TOLERANCE)


async def stops_at_the_end(engine: GenerationEngine) -> None:
    chunk = await engine.complete(EngineRequest("family-end", PROMPT, Sampling(80, seed=5)))
    assert chunk.finish_reason is FinishReason.STOP
    assert chunk.token_ids[-1] in ENDS
    assert not set(ENDS) & set(chunk.token_ids[:-1])


CASES = [("transformers", family) for family in FAMILIES] + [
    pytest.param("vllm", family, marks=pytest.mark.vllm) for family in ("gpt2", "gemma2")
]


@pytest.mark.parametrize(("kind", "family"), CASES)
async def test_a_family_is_sampled_pushed_and_sampled_again(kind: str, family: str, tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "store", "test")
    versions = [VersionId(1, 0), VersionId(1, 1)]
    models = [publish(store, tmp_path, family, version) for version in versions]
    directories = [store.fetch(version, tmp_path / "cache") for version in versions]
    engine = make_engine(kind, InitialVersion(versions[0], directories[0]))
    await engine.start()
    try:
        assert engine.limits.vocab_size == 264
        await sampled_truly(engine, models[0], versions[0])
        await engine.prepare(versions[1], directories[1])
        report = await engine.commit(versions[1])
        assert report.canary_max_error < TOLERANCE
        await sampled_truly(engine, models[1], versions[1])
        await stops_at_the_end(engine)
    finally:
        await engine.close()
