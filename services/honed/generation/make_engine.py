"""From the settings to an engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from honed.generation.engine import CommitSettings, GenerationEngine, InitialVersion
from honed.generation.gate import RequestGate
from honed.generation.settings import GenerationSettings
from honed.kit.errors import InvalidArgument


def make_engine(
    section: GenerationSettings, initial: InitialVersion | Iterable[InitialVersion], gate: RequestGate
) -> GenerationEngine:
    """The engine that the settings name; it reads `initial` when it starts.

    Raises:
        InvalidArgument: Several GPUs are asked for where vLLM is not installed.
    """
    commit = CommitSettings(section.canary_tolerance, section.call_timeout_s, section.commit_timeout_s)
    kind = section.engine
    if kind == "auto":
        kind = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if kind == "vllm":
        from honed.generation.vllm.engine import VLLMEngine, VLLMSettings

        return VLLMEngine(
            initial,
            VLLMSettings(
                dtype=section.dtype,
                max_model_len=section.max_model_tokens,
                max_num_seqs=section.max_num_seqs,
                max_batched_tokens=section.max_batched_tokens,
                kv_cache_gib=section.kv_cache_gib,
                gpu_memory_share=section.gpu_memory_share,
                cuda_graphs=section.cuda_graphs,
                tensor_parallel=section.tensor_parallel,
                staged_load=section.staged_load,
                threads=section.threads,
            ),
            commit,
            gate=gate,
            request_timeout_s=section.request_timeout_s,
        )
    if section.tensor_parallel > 1:
        raise InvalidArgument(
            "generation.tensor_parallel",
            f"{section.tensor_parallel} GPUs share a model with vLLM alone, which is not installed",
        )
    from honed.generation.hf.engine import TransformersEngine, TransformersSettings

    return TransformersEngine(
        initial,
        TransformersSettings(
            dtype=section.dtype,
            max_model_len=section.max_model_tokens,
            max_batch=section.max_num_seqs,
            max_batched_tokens=section.max_batched_tokens,
            threads=section.threads,
            staged_load=section.staged_load,
        ),
        commit,
        gate=gate,
        request_timeout_s=section.request_timeout_s,
    )
