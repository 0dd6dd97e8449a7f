"""The run file: one typed tree of settings, with environment variables over it.

`HONED_<SECTION>__<KEY>` overrides a key, for example `HONED_LEARNER__BATCH=512`. Secrets come by file or environment only. An
unknown key is an error that names the nearest known one (`honed.settings_file` reads and explains; this module only declares).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of the tree: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class TlsSettings(Section):
    """PEM files for mutual TLS between all services; leave the section out for plain text."""

    authority: Path
    certificate: Path
    key: Path


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

    @property
    def target(self) -> str:
        """The gRPC target of the service for its callers."""
        return self.address or f"{self.host}:{self.port}"


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


class GenerationSettings(ServerSettings):
    """The generation service."""

    engine: Literal["auto", "vllm", "transformers"] = Field("auto", description="auto: vLLM where it is installed.")
    control_port: Port = Field(0, description="Port of GenerationControlService, never public.")
    control_addresses: tuple[str, ...] = Field((), description="Control targets of all replicas. Unset: host:control_port.")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_model_tokens: Positive = Field(256, description="Prompt and response together.")
    max_prompt_tokens: Positive = 192
    max_tokens: Positive = Field(128, description="Cap on max_tokens of a request.")
    default_max_tokens: Positive = 24
    max_samples: Positive = Field(16, description="Cap on n of a request.")
    max_queued: Positive = Field(512, description="Samples in flight at most; beyond is RESOURCE_EXHAUSTED.")
    max_num_seqs: Positive = Field(64, description="Samples that the engine runs at once.")
    kv_cache_gib: Annotated[float, Field(gt=0)] = Field(0.5, description="KV cache on a machine without a GPU.")
    threads: Positive = Field(1, description="Compute threads of the engine on a machine without a GPU.")
    weights_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of published versions.")
    canary_tolerance: Annotated[float, Field(gt=0)] = Field(1e-3, description="Nats; more, and a version is rolled back.")
    commit_timeout_s: Seconds = 60.0
    rollout_concurrency: Positive = Field(64, description="Training prompts in flight at once.")


class TruncateSettings(Section):
    """Cut the scored text at a token of the policy; training still sees the whole response."""

    token_text: str = Field(description="Text of the single token to cut after, for example '.'.")
    not_before: int = Field(16, ge=0, description="Position from which on the token counts.")
    missing_score: float = Field(-1.0, description="Reward when the token never comes there.")


class ScorerSettings(Section):
    """One term of the reward."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    kind: Literal["reward_model", "function"]
    source: str = Field(description="Model directory, `trained` for the run's own, or a function of the group honed.scorers.")
    weight: float = 1.0
    sees_prompt: bool = Field(True, description="Score prompt and response; otherwise the response alone.")


class RewardSettings(ServerSettings):
    """The reward service."""

    scorers: tuple[ScorerSettings, ...] = ()
    truncate: TruncateSettings | None = None
    batch_tokens: Positive = Field(8192, description="Tokens of a dynamic batch at most.")
    batch_wait_ms: Annotated[float, Field(ge=0)] = Field(4.0, description="How long a batch waits for company.")
    max_queued: Positive = Field(4096, description="Items waiting at most; beyond is RESOURCE_EXHAUSTED.")
    threads: Positive = 1
    allowed_roots: tuple[str, ...] = Field((), description="Where LoadScorer may load from. Unset: <directory>.")


class PreferenceSettings(ServerSettings):
    """The preference service."""

    database_url: SecretStr | None = Field(None, description="SQLAlchemy URL. Unset: SQLite in <directory>.")
    import_batch: Positive = 500


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
        None, description="The same data gives the same bits. Unset: on a CPU, where it costs nothing; a GPU may be much slower with it."
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: Positive = 1
    batch: Positive = Field(256, description="Rollouts of one optimizer step's data.")
    epochs: Positive = 4
    minibatches: Positive = 1
    microbatch_tokens: Positive = Field(8192, description="Tokens of one forward pass at most.")
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    schedule: Literal["linear", "constant"] = "linear"
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
    steps: Positive = Field(40, description="Versions to train.")
    checkpoint_every: Positive = 1
    keep_checkpoints: Positive = 2
    push_timeout_s: Seconds = Field(120.0, description="Deadline of each call to a generator.")
    overlap_push: bool | None = Field(
        None, description="Train on while a version is brought in. Unset: only with a GPU, where no core is shared."
    )
    push_retry_s: Seconds = Field(300.0, description="How long a push is tried again while a generator is down.")


class PretrainSettings(Section):
    """Language-model pretraining, the first phase of a run that starts from nothing."""

    seconds: Seconds = Field(190.0, description="Ends at the latest after so long.")
    tokens: Positive = Field(1_500_000, description="Ends at the latest after so many.")
    learning_rate: Annotated[float, Field(gt=0)] = 4e-3
    warmup_steps: Annotated[int, Field(ge=0)] = Field(20, description="Over which the learning rate rises to its peak.")
    final_rate: Share = Field(0.05, description="Share of the peak that the learning rate falls to, along half a cosine.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="Of matrices.")
    gradient_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are scaled down to this norm.")
    vocabulary: Positive = 8192
    hidden_size: Positive = 128
    layers: Positive = 4
    head_size: Positive = 32
    block_tokens: Positive = Field(128, description="Length of a packed training sequence.")
    block_rows: Positive = 8
    threads: Positive = 2


class RewardTrainingSettings(Section):
    """Reward-model training from exported comparisons."""

    comparisons: Positive = Field(70_000, description="How many the default run draws and imports.")
    seconds: Seconds = Field(110.0, description="Ends at the latest after so long.")
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    objective: Literal["ranked_pairs", "best_of_k"] = Field(
        "ranked_pairs", description="All pairs of a ranking (InstructGPT), or its best against the rest (lm-human-preferences)."
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="Share of the training in which the rate rises.")
    gradient_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are scaled down to this norm.")
    batch_texts: Annotated[int, Field(ge=2)] = Field(32, description="Different texts of one optimizer step.")
    microbatch_tokens: Positive = Field(8192, description="Tokens of one forward and backward pass at most; bounds memory alone.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="What the model computes in; its weights are float32.")
    embedding_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    weight_decay: Annotated[float, Field(ge=0)] = Field(1.0, description="Of matrices.")
    layers: Positive | None = Field(1, description="How many layers of the language model to keep; null keeps all.")
    threads: Positive = Field(1, description="The generation service starts beside it.")


class ConductorSettings(ServerSettings):
    """The run."""

    start_from: str | None = Field(None, description="Hugging Face model directory; unset: pretrain one.")
    prompts: Path | None = Field(None, description="JSON lines with `text` or `token_ids`; unset: made from the data set.")
    max_in_flight: Positive = Field(1024, description="Rollouts between admission and scoring at most.")
    samples_per_prompt: Positive = 1
    temperature: Annotated[float, Field(gt=0)] = 1.0
    response_tokens: Positive = 24
    fixed_length: bool = True
    restart_limit: Positive = Field(10, description="Restarts of one service before the run fails.")
    dead_letter_limit: Positive = Field(1000, description="Dead letters of one run after which it fails.")
    start_timeout_s: Seconds = 180.0
    drain_timeout_s: Seconds = Field(300.0, description="How long the streams may take to empty after the last step.")


class DataSettings(Section):
    """The default run's human ratings."""

    cache: Path = Field(Path("~/.cache/honed"), description="Where downloads are kept.")
    held_out: Positive = Field(1500, description="Movie texts that nothing trains on.")
    judge: Positive = Field(3000, description="Movie texts of the independent judge, which also give the training prompts.")
    evaluation_prompts: Positive = 256


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
