"""The run file's section on the generation service."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from honed.settings import Port, Positive, Rate, ReplicatedSettings, Seconds, Share


class GenerationSettings(ReplicatedSettings):
    """The generation service."""

    engine: Literal["auto", "vllm", "transformers"] = Field("auto", description="auto: vLLM where it is installed.")
    control_port: Port = Field(0, description="Port of GenerationControlService, never public.")
    control_address: str | None = Field(None, description="Where the learner reaches this replica. Unset: host:control_port.")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_model_tokens: Positive = Field(2048, description="Prompt and response together.")
    max_prompt_tokens: Positive = 1536
    max_tokens: Positive = Field(1024, description="Cap on max_tokens of a request.")
    default_max_tokens: Positive = 256
    max_samples: Positive = Field(16, description="Cap on n of a request.")
    max_queued: Positive = Field(512, description="Samples in flight at most; beyond is RESOURCE_EXHAUSTED.")
    application_share: Share = Field(
        0.95, description="Of the engine and of its queue, what applications have when they need it; training has the rest."
    )
    max_num_seqs: Positive = Field(64, description="Samples that the engine runs at once.")
    kv_cache_gib: Rate = Field(2.0, description="vLLM's KV cache on a machine without a GPU.")
    threads: Positive = Field(1, description="Compute threads of the engine on a machine without a GPU.")
    weights_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of published versions.")
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)] = Field(0.85, description="Share of a GPU's memory for vLLM.")
    cuda_graphs: bool | None = Field(None, description="Compile and replay CUDA graphs. Unset: on a GPU yes; a CPU cannot.")
    max_batched_tokens: Positive = Field(2048, description="Tokens that one step of the engine processes, prompts included.")
    tensor_parallel: Positive = Field(1, description="GPUs that share the model; vLLM alone can.")
    staged_load: bool = Field(True, description="Load new weights beside those that serve: short pauses, twice the memory.")
    canary_tolerance: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Nats; more, and a version is rolled back. Unset: 0.001 in float32, 0.03 in float16, 0.1 in bfloat16."
    )
    call_timeout_s: Seconds = Field(30.0, description="Deadline of a call into the engine; a load has 1 s more for each 50 MB.")
    commit_timeout_s: Seconds = Field(60.0, description="Deadline of a change of weights, with as much more.")
    request_timeout_s: Seconds = Field(
        600.0, description="What sampling a response may take, pauses not counted; a training prompt is then tried again."
    )
    scoring_timeout_s: Seconds = Field(
        30.0,
        description="What scoring the candidates of a request with best_of may take; the whole call has its caller's deadline.",
    )
    rollout_concurrency: Positive = Field(64, description="Training samples in flight at once.")
    stall_s: Seconds = Field(120.0, description="An engine with work that gives no token for so long is started anew.")

    @model_validator(mode="after")
    def _vllm_alone_has_several_gpus(self) -> Self:
        if self.engine == "transformers" and self.tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel}, and engine transformers has one device: use vllm, or 1"
            )
        return self

    @model_validator(mode="after")
    def _a_step_holds_every_sequence(self) -> Self:
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens is {self.max_batched_tokens}, less than max_num_seqs {self.max_num_seqs}: "
                "a step must have room for one token of each sample; raise the first or lower the second"
            )
        return self
