"""Claims about what reaches vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from honed.artifacts.names import check_run
from honed.artifacts.version import VersionId
from honed.generation.engine import CommitSettings, InitialVersion
from honed.generation.gate import RequestGate
from honed.generation.hf.engine import TransformersEngine
from honed.generation.make_engine import make_engine
from honed.generation.requests import EngineRequest, Sampling
from honed.generation.settings import GenerationSettings
from honed.generation.vllm.adapter import VLLM
from honed.generation.vllm.engine import VLLMEngine
from honed.generation.vllm.plugin import CANARY_PREFIX
from honed.generation.vllm.settings import VLLMSettings, engine_arguments, set_environment
from honed.kit.errors import InvalidArgument

FIRST = InitialVersion(VersionId(1, 0), Path("/models/first"))
CHANGED = {
    "engine": "vllm",
    "dtype": "bfloat16",
    "max_model_tokens": 777,
    "max_num_seqs": 11,
    "max_batched_tokens": 1234,
    "kv_cache_gib": 2.0,
    "gpu_memory_share": 0.5,
    "cuda_graphs": False,
    "tensor_parallel": 4,
    "staged_load": False,
    "threads": 3,
    "canary_tolerance": 0.25,
    "call_timeout_s": 12.0,
    "commit_timeout_s": 34.0,
}


def made() -> VLLMEngine:
    engine = make_engine(GenerationSettings.model_validate(CHANGED), FIRST, RequestGate(8, 10, application_share=0.75))
    assert isinstance(engine, VLLMEngine)
    return engine


def test_each_setting_reaches_vllm_on_a_gpu() -> None:
    arguments = engine_arguments(made()._settings, Path("/models/first"), cpu=False)
    assert (
        arguments
        | {
            "model": "/models/first",
            "dtype": "bfloat16",
            "max_model_len": 777,
            "max_num_seqs": 11,
            "max_num_batched_tokens": 1234,
            "gpu_memory_utilization": 0.5,
            "enforce_eager": True,
            "tensor_parallel_size": 4,
        }
        == arguments
    )
    assert "kv_cache_memory_bytes" not in arguments


def test_each_setting_that_a_cpu_has_reaches_vllm_there(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = made()._settings
    arguments = engine_arguments(VLLMSettings(kv_cache_gib=settings.kv_cache_gib), Path("/m"), cpu=True)
    assert arguments["kv_cache_memory_bytes"] == 2 << 30
    whole = engine_arguments(VLLMSettings(max_model_len=4096, max_num_seqs=8), Path("/m"), cpu=True)
    assert (whole["enable_chunked_prefill"], whole["max_num_batched_tokens"]) == (False, 4104)
    assert "gpu_memory_utilization" not in arguments
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    set_environment(settings)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256", "without it a generator grows for hundreds of pushes"
    assert settings.staged_load is False


def test_graphs_are_for_gpus_unless_told_otherwise() -> None:
    def eager(cuda_graphs: bool | None, *, cpu: bool) -> bool:
        return bool(engine_arguments(VLLMSettings(cuda_graphs=cuda_graphs), Path("/m"), cpu=cpu)["enforce_eager"])

    assert [eager(None, cpu=False), eager(True, cpu=False), eager(False, cpu=False)] == [False, False, True]
    assert [eager(None, cpu=True), eager(False, cpu=True)] == [True, True]


def test_what_a_cpu_cannot_do_is_refused_by_its_name() -> None:
    with pytest.raises(InvalidArgument, match=r"generation\.cuda_graphs: .* need a GPU"):
        engine_arguments(VLLMSettings(cuda_graphs=True), Path("/m"), cpu=True)
    with pytest.raises(InvalidArgument, match=r"generation\.tensor_parallel: 2 GPUs"):
        engine_arguments(VLLMSettings(tensor_parallel=2), Path("/m"), cpu=True)


def test_several_gpus_are_refused_where_vllm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("honed.generation.make_engine.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match=r"generation\.tensor_parallel: 2 GPUs share a model with vLLM alone"):
        make_engine(GenerationSettings(tensor_parallel=2), FIRST, RequestGate(8, 10, application_share=0.75))


def test_the_same_settings_reach_the_engine_on_transformers() -> None:
    section = GenerationSettings.model_validate({**CHANGED, "engine": "transformers", "tensor_parallel": 1})
    engine = make_engine(section, FIRST, RequestGate(8, 10, application_share=0.75))
    assert isinstance(engine, TransformersEngine)
    found = engine._settings
    assert (found.dtype, found.max_model_len, found.max_batch) == ("bfloat16", 777, 11)
    assert (found.max_batched_tokens, found.threads) == (1234, section.threads)


def test_the_bounds_of_a_push_are_settings() -> None:
    assert made()._commits == CommitSettings(0.25, 12.0, 34.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gpu_memory_share": 0.0}, "gpu_memory_share"),
        ({"gpu_memory_share": 1.1}, "gpu_memory_share"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"call_timeout_s": 0}, "call_timeout_s"),
        ({"engine": "transformers", "tensor_parallel": 2}, r"tensor_parallel is 2, and engine transformers has one device"),
        ({"max_batched_tokens": 32}, r"max_batched_tokens is 32, less than max_num_seqs 64"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GenerationSettings.model_validate(wrong)


def test_no_run_and_no_request_can_have_the_name_of_a_canary() -> None:
    for name in (CANARY_PREFIX, f"{CANARY_PREFIX}1"):
        with pytest.raises(InvalidArgument):
            check_run(name)


async def test_a_request_with_a_canarys_name_is_refused() -> None:
    vllm = VLLM.__new__(VLLM)
    with pytest.raises(InvalidArgument, match="request_id"):
        await vllm.submit(EngineRequest(f"{CANARY_PREFIX}1", [1], Sampling(1)), "1.0", lambda: None, stream=False)
