"""The run file: one typed tree of settings, with environment variables over it.

`HONED_<SECTION>__<KEY>` overrides a key, for example `HONED_LEARNER__BATCH=512`. Secrets come by file or environment only. An
unknown key is an error that names the nearest known one (`honed.settings_file` reads and explains; this module only declares).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from honed.kit.address import host_port

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of the tree: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class TlsSettings(Section):
    """PEM files for mutual TLS between all services; leave the section out for plain text."""

    authority: Path
    certificate: Path
    key: Path
    server_name: str | None = Field(
        None, description="Name that all certificates carry. Unset: each carries the address that its service is called by."
    )


class SecuritySettings(Section):
    """Who may call."""

    authentication: bool = Field(True, description="Ask for bearer tokens.")
    tokens: Path | None = Field(None, description="Directory of tokens. Unset: <directory>/tokens, made on first use.")
    tls: TlsSettings | None = None


class ServerSettings(Section):
    """How a service listens. A local launcher replaces port 0 by a free port."""

    host: str = "127.0.0.1"
    port: Port = 0
    health_port: Port = Field(0, description="Plain-text port with the health service alone.")
    metrics_port: Port = Field(0, description="HTTP port of /metrics.")
    address: str | None = Field(None, description="Where others reach the service. Unset: host:port.")
    reflection: bool = True
    deadline_s: Seconds = 600.0
    drain_s: Seconds = 15.0
    linger_s: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Ports stay open so long after SIGTERM with readiness off. Unset: 0 on loopback, 3 elsewhere."
    )
    max_calls: Positive = Field(2048, description="Calls in flight at most; beyond is RESOURCE_EXHAUSTED.")
    max_streams: Positive = Field(1024, description="Calls in flight on one connection at most.")

    @property
    def target(self) -> str:
        """The gRPC target of the service for its callers."""
        return self.address or host_port(self.host, self.port)


class ReplicatedSettings(ServerSettings):
    """A service of which several processes may run. Each one registers itself under a lease; nothing is listed by hand."""

    replicas: Positive = Field(1, description="How many processes the launcher starts.")
    replica: Count = Field(0, description="Which of them this process is; the launcher sets it.")


class QueueSettings(Section):
    """Redis Streams between the stages."""

    url: str | None = Field(None, description="redis://host:port/db. Unset: an embedded redis-server with AOF.")
    password: SecretStr | None = Field(None, description="Password for the URL; by environment or password_file.")
    password_file: Path | None = None
    port: Port = Field(0, description="Port of the embedded server.")
    lease_s: Seconds = Field(30.0, description="A consumer silent for longer loses its entries to another.")
    max_deliveries: Positive = Field(5, description="After so many deliveries an entry goes to the dead letters.")
    outage_s: Seconds = Field(120.0, description="How long to ride out a Redis that is gone.")


class PolicyStoreSettings(Section):
    """Where policy versions are kept."""

    url: str | None = Field(None, description="Directory or fsspec URL. Unset: <directory>/policy.")
    keep: Positive = Field(6, description="How many of the newest versions to keep.")


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
        0.75, description="Of the engine and of its queue, what applications have when they need it; training has the rest."
    )
    max_num_seqs: Positive = Field(64, description="Samples that the engine runs at once.")
    kv_cache_gib: Rate = Field(2.0, description="KV cache on a machine without a GPU.")
    threads: Positive = Field(1, description="Compute threads of the engine on a machine without a GPU.")
    weights_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of published versions.")
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)] = Field(0.85, description="Share of a GPU's memory for the engine.")
    cuda_graphs: bool | None = Field(None, description="Compile and replay CUDA graphs. Unset: on a GPU yes; a CPU cannot.")
    max_batched_tokens: Positive = Field(2048, description="Tokens that one step of the engine processes, prompts included.")
    tensor_parallel: Positive = Field(1, description="GPUs that share the model.")
    staged_load: bool = Field(True, description="Load new weights beside those that serve: short pauses, twice the memory.")
    canary_tolerance: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Nats; more, and a version is rolled back. Unset: 0.001 in float32, 0.03 in float16, 0.1 in bfloat16."
    )
    call_timeout_s: Seconds = Field(30.0, description="Deadline of a call into the engine; a load has 1 s more for each 50 MB.")
    commit_timeout_s: Seconds = Field(60.0, description="Deadline of a change of weights, with as much more.")
    rollout_concurrency: Positive = Field(64, description="Training samples in flight at once.")
    stall_s: Seconds = Field(120.0, description="An engine with work that gives no token for so long is started anew.")

    @model_validator(mode="after")
    def _a_step_holds_every_sequence(self) -> Self:
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens is {self.max_batched_tokens}, less than max_num_seqs {self.max_num_seqs}: "
                "a step must have room for one token of each sample; raise the first or lower the second"
            )
        return self


class TruncateSettings(Section):
    """Cut the scored text at a token of the policy; training still sees the whole response."""

    token_text: str = Field(description="Text of the single token to cut after, for example '.'.")
    not_before: int = Field(16, ge=0, description="Position from which on the token counts.")
    missing_score: float = Field(-1.0, description="Reward when the token never comes there.")


class ScorerSettings(Section):
    """One term of the reward."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    kind: Literal["reward_model", "function"]
    source: str = Field(
        description="Model directory, `trained` for the newest reward model of this run, `artifact:NAME/VERSION`, or a "
        "function of the group honed.scorers."
    )
    weight: float = 1.0
    sees_prompt: bool = Field(True, description="Score prompt and response; otherwise the response alone.")


class RewardSettings(ReplicatedSettings):
    """The reward service."""

    scorers: tuple[ScorerSettings, ...] = ()
    truncate: TruncateSettings | None = None
    batch_tokens: Positive = Field(8192, description="Tokens of a dynamic batch at most.")
    batch_wait_ms: Annotated[float, Field(ge=0)] = Field(4.0, description="How long a batch waits for company.")
    max_queued: Positive = Field(4096, description="Items waiting at most; beyond is RESOURCE_EXHAUSTED.")
    threads: Positive = 1
    allowed_roots: tuple[str, ...] = Field((), description="Where LoadScorer may load from. Unset: <directory>.")
    on_promotion: Literal["rescore", "drop", "keep"] = Field(
        "rescore", description="What becomes of rollouts that the reward model before has scored."
    )


class PreferenceSettings(ServerSettings):
    """The preference service."""

    database_url: SecretStr | None = Field(None, description="SQLAlchemy URL. Unset: SQLite in <directory>.")
    import_batch: Positive = 500
    migration_deadline_s: Seconds = Field(3600.0, description="The longest that a change of the schema may take.")
    erase_page: Positive = Field(5000, description="Judgements that one transaction of an erasure changes.")


class KlSettings(Section):
    """The penalty for leaving the reference policy."""

    controller: Literal["adaptive", "rl4lms", "fixed"] = "adaptive"
    coefficient: Annotated[float, Field(ge=0)] = 0.15
    target: Annotated[float, Field(gt=0)] = Field(6.0, description="Nats a response.")
    horizon: Positive = Field(10_000, description="Episodes.")


class LearnerSettings(ServerSettings):
    """The learner: PPO as lm-human-preferences states it, with a decoupled objective for stale data."""

    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    deterministic: bool | None = Field(
        None, description="The same data gives the same bits. Unset: on a CPU, where that is free; a GPU gets slower by it."
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: Positive = 1
    batch: Positive = Field(256, description="Rollouts of one update.")
    epochs: Positive = 4
    minibatches: Positive = 1
    microbatch_tokens: Positive = Field(8192, description="Tokens of one forward pass at most.")
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    schedule: Literal["auto", "linear", "constant"] = Field(
        "auto", description="auto: linear to 0 over `steps`; constant when the run has no end."
    )
    optimizer: Literal["adam_tf", "adamw"] = "adam_tf"
    clip_ratio: Annotated[float, Field(gt=0)] = 0.2
    clip_value: Annotated[float, Field(gt=0)] = 0.2
    value_coefficient: Annotated[float, Field(ge=0)] = 0.1
    gamma: Share = 1.0
    lam: Share = 0.95
    importance_cap: Annotated[float, Field(ge=1)] = Field(2.0, description="Cap of the behaviour weight of a token.")
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    reward_normalisation: Literal["reference", "running", "none"] = "reference"
    kl: KlSettings = KlSettings()
    max_staleness: Annotated[int, Field(ge=0)] = Field(2, description="Versions; older rollouts are dropped and counted.")
    steps: Positive | None = Field(None, description="Updates to train; null trains until it is stopped.")
    checkpoint_every: Positive = 1
    keep_checkpoints: Positive = 2
    push_timeout_s: Seconds = Field(120.0, description="Deadline of each call to a generator.")
    overlap_push: bool | None = Field(
        None, description="Train on while a version is brought in. Unset: only with a GPU, where no core is shared."
    )
    on_refused: Literal["rollback", "continue"] = Field(
        "rollback", description="When generators refuse a version: back to the last good checkpoint, or on from these weights."
    )
    bad_batches: Positive = Field(3, description="Batches in a row that may be skipped as not finite or exploding.")
    max_ratio: Annotated[float, Field(gt=1)] = Field(
        100.0, description="A batch whose mean importance ratio passes this, or falls under its inverse, is skipped."
    )
    update_timeout_s: Seconds = Field(3600.0, description="An update that takes longer is taken for hung.")
    journal_mb: Positive = Field(512, description="Disk space of the journal; its oldest updates go first.")


class PretrainSettings(Section):
    """Language-model pretraining, the first phase of a run that starts from nothing."""

    seconds: Seconds | None = Field(None, description="Ends at the latest after so long; null: no limit.")
    tokens: Positive = Field(20_000_000, description="Ends at the latest after so many.")
    learning_rate: Rate = 1e-3
    warmup_steps: Count = Field(20, description="Over which the learning rate rises to its peak.")
    final_rate: Share = Field(0.05, description="Share of the peak that the learning rate falls to, along half a cosine.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="Of matrices.")
    gradient_norm: Rate = Field(1.0, description="Gradients are scaled down to this norm.")
    vocabulary: Positive = 8192
    hidden_size: Positive = 256
    layers: Positive = 6
    head_size: Positive = 32
    block_tokens: Positive = Field(256, description="Length of a packed training sequence.")
    block_rows: Positive = 8
    threads: Positive = 2


class RewardTrainingSettings(Section):
    """Reward-model training on the judgements of the preference service."""

    seconds: Seconds | None = Field(None, description="Ends at the latest after so long; null: no limit.")
    learning_rate: Rate = 1e-5
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="Share of the training in which the rate rises.")
    objective: Literal["ranked_pairs", "best_of_k"] = Field(
        "ranked_pairs", description="All pairs of a ranking (InstructGPT), or its best against the rest (lm-human-preferences)."
    )
    batch_texts: Annotated[int, Field(ge=2)] = Field(32, description="Different texts of one optimizer step.")
    microbatch_tokens: Positive = Field(2048, description="Tokens of one forward and backward pass at most; it bounds memory.")
    gradient_norm: Rate = Field(1.0, description="Gradients are scaled down to this norm.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Of the computation; weights stay float32.")
    embedding_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="Of matrices.")
    layers: Positive | None = Field(None, description="How many layers of the language model to keep; null keeps all.")
    normalising_samples: Positive = Field(256, description="Samples of the reference policy that set gain and bias.")
    threads: Positive = Field(1, description="The generation service runs beside it.")


class ApplicationPromptsSettings(Section):
    """Prompts taken from what applications ask. Off unless `share` is set."""

    share: Share = Field(0.0, description="Of the requests, how many are offered for training.")
    redact: str | None = Field(None, description="A function of the group honed.redactors: text to text or None.")
    limit: Positive = Field(10_000, description="How many wait at most; beyond, the oldest go.")


class PromptMixSettings(Section):
    """How often each source is drawn from while it has prompts, relative to the others."""

    file: Annotated[float, Field(ge=0)] = 1.0
    submitted: Annotated[float, Field(ge=0)] = 1.0
    application: Annotated[float, Field(ge=0)] = 1.0
    submitted_limit: Positive = Field(10_000, description="Submitted prompts that wait at most; beyond is RESOURCE_EXHAUSTED.")


class ConductorSettings(ServerSettings):
    """The run."""

    launcher: Literal["process", "none"] = Field(
        "process", description="process: services are child processes. none: they run elsewhere and register themselves."
    )
    start_from: str | None = Field(None, description="Hugging Face model directory; unset: pretrain one on data.texts.")
    max_in_flight: Positive = Field(1024, description="Rollouts between admission and scoring at most.")
    samples_per_prompt: Positive = 1
    temperature: Rate = 1.0
    top_p: Rate = Field(1.0, description="Only 1: training needs the full support, or its importance ratios are biased.")
    response_tokens: Positive = Field(256, description="The most tokens of a training response.")
    fixed_length: bool = Field(False, description="Sample exactly response_tokens, past any end-of-sequence token.")
    prompt_mix: PromptMixSettings = PromptMixSettings()
    application_prompts: ApplicationPromptsSettings = ApplicationPromptsSettings()
    restart_limit: Positive = Field(10, description="Restarts of one service within restart_window_s before an alarm.")
    restart_window_s: Seconds = 600.0
    dead_letter_limit: Positive = Field(1000, description="Dead letters within dead_letter_window_s before an alarm.")
    dead_letter_window_s: Seconds = 600.0
    start_timeout_s: Seconds = 180.0
    drain_timeout_s: Seconds = Field(300.0, description="How long the streams may take to empty after the last update.")
    log_mb: Positive = Field(64, description="Size of one log file before it is rotated; one older one is kept.")


class JudgementsFile(Section):
    """A file of judgements."""

    file: Path
    format: Literal["honed", "trl", "hh", "summarize"] = "honed"
    source: str = Field("file", min_length=1, max_length=128, description="Where they come from; part of their keys.")
    annotator: str = Field("unknown", min_length=1, max_length=128, description="Who judged, where the format does not say.")


class EvaluationSettings(Section):
    """What nothing trains on."""

    judgements: JudgementsFile | None = Field(None, description="Held-out judgements, to measure the reward model's agreement.")
    prompts: Path | None = Field(None, description="Held-out prompts, continued before and after training.")
    samples: Positive = Field(64, description="How many of the prompts are continued.")


class DataSettings(Section):
    """What a run learns from. JSON lines; `honed check` reads them line by line before anything starts."""

    texts: tuple[Path, ...] = Field((), description="`text`: for pretraining, when there is no conductor.start_from.")
    prompts: Path | None = Field(None, description="`text`, `token_ids` or `messages`: what is trained on.")
    judgements: tuple[JudgementsFile, ...] = Field(
        (), description="Imported at the start; what is stored already is not doubled."
    )
    evaluation: EvaluationSettings = EvaluationSettings()


class RunSettings(Section):
    """A run file."""

    run: str = Field("local", pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    directory: Path = Field(Path("out/local"), description="Everything that the run writes.")
    seed: int = Field(1, ge=0)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    security: SecuritySettings = SecuritySettings()
    queue: QueueSettings = QueueSettings()
    policy: PolicyStoreSettings = PolicyStoreSettings()
    generation: GenerationSettings = GenerationSettings()
    reward: RewardSettings = RewardSettings()
    preference: PreferenceSettings = PreferenceSettings()
    learner: LearnerSettings = LearnerSettings()
    pretrain: PretrainSettings = PretrainSettings()
    reward_training: RewardTrainingSettings = RewardTrainingSettings()
    conductor: ConductorSettings = ConductorSettings()
    data: DataSettings = DataSettings()

    @model_validator(mode="after")
    def _consistent(self) -> RunSettings:
        if self.learner.batch % self.conductor.samples_per_prompt:
            raise ValueError("learner.batch must be a multiple of conductor.samples_per_prompt")
        if self.conductor.max_in_flight < self.conductor.samples_per_prompt:
            raise ValueError("conductor.max_in_flight must be at least conductor.samples_per_prompt, or no prompt is admitted")
        if self.learner.schedule == "linear" and self.learner.steps is None:
            raise ValueError("learner.schedule: linear falls to 0 at learner.steps, which is null: set steps, or take constant")
        if self.conductor.top_p != 1:
            raise ValueError(
                f"conductor.top_p: {self.conductor.top_p:g} cuts the support of the policy and biases the importance ratios: "
                "training samples need 1"
            )
        if self.generation.max_prompt_tokens >= self.generation.max_model_tokens:
            raise ValueError("generation.max_prompt_tokens must leave room for a response in generation.max_model_tokens")
        most = min(self.generation.max_tokens, self.generation.max_model_tokens - 1)
        if self.conductor.response_tokens > most:
            raise ValueError(
                f"conductor.response_tokens must be at most {most}, what generation.max_tokens and max_model_tokens leave: "
                "the generator would refuse every prompt"
            )
        return self

    @property
    def tokens_directory(self) -> Path:
        """Where the tokens are."""
        return self.security.tokens or self.directory / "tokens"

    @property
    def policy_url(self) -> str:
        """Where the policy store is."""
        return self.policy.url or str(self.directory / "policy")

    @property
    def database_url(self) -> str:
        """The preference database."""
        if self.preference.database_url is not None:
            return self.preference.database_url.get_secret_value()
        return f"sqlite+aiosqlite:///{self.directory / 'preference.sqlite'}"
