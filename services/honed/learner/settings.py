"""The run file's sections on training: the learner, pretraining, and reward models."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from honed.settings import Count, Positive, Rate, Seconds, Section, ServerSettings, Share, Weight

Decay = Annotated[float, Field(ge=0, lt=1)]


class KlSettings(Section):
    """The penalty for leaving the reference policy."""

    controller: Literal["adaptive", "rl4lms", "fixed"] = "adaptive"
    coefficient: Annotated[float, Field(ge=0)] = 0.15
    target: Annotated[float, Field(gt=0)] = Field(6.0, description="Nats a response.")
    horizon: Positive = Field(10_000, description="Episodes.")


class DirectPreferenceSettings(Section):
    """What an algorithm that learns from preferences directly reads: the judgements of the preference service."""

    refresh: bool = Field(True, description="After each pass over the judgements, read those that have come meanwhile too.")
    append_end: bool = Field(True, description="A response ends with the end-of-text token, which is learned too.")
    rating_threshold: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5,
        description="Where single responses are learned from: ratings above this share of their scale call one good, those "
        "below it bad; one that is exactly there says nothing.",
    )


class PretrainingMixSettings(Section):
    """A supervised loss in the same steps as the algorithm's (PPO-ptx of InstructGPT), so that old skills are kept."""

    coefficient: Rate = Field(27.8, description="Of the mean cross-entropy, nats a token; InstructGPT's is 27.8.")
    examples: Rate = Field(8.0, description="Examples a rollout, or a pair; InstructGPT's are 8.")
    data: Literal["texts", "demonstrations"] = Field("texts", description="data.texts, in blocks, or data.demonstrations.")
    block_tokens: Annotated[int, Field(ge=2)] = Field(64, description="Length of a block of texts.")


class LearnerSettings(ServerSettings):
    """The learner. Defaults are PPO's as lm-human-preferences states it, with a decoupled objective for stale data."""

    algorithm: str = Field("ppo", description="What learns from scored responses: a file of honed/learner/algorithms.")
    options: dict[str, Any] = Field({}, description="What the algorithm has of its own beside the numbers here.")

    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    deterministic: bool | None = Field(
        None, description="The same data gives the same bits. Unset: on a CPU, where that is free; a GPU gets slower by it."
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: Positive | None = Field(
        None, description="Compute threads on a CPU. Unset: the cores that generation leaves, one of two for a small model."
    )
    own_cores: Positive | None = Field(
        None,
        description="Cores that `honed up` keeps its other processes off, on a machine without a GPU: nothing interrupts "
        "training, and serving has the rest. As many threads unless threads says fewer. Unset: all share, serving goes first.",
    )
    batch: Positive = Field(256, description="Rollouts of one update.")
    epochs: Positive | None = Field(
        None, description="Passes over a batch. Unset: 4 with a clipped ratio (ppo, grpo, rloo), else 1."
    )
    minibatches: Positive = 1
    microbatch_tokens: Positive = Field(8192, description="Tokens of one forward pass at most.")
    unfrozen_layers: Positive | None = Field(
        None,
        description="Train the policy's last so many layers, final norm and untied output layer alone; the reference is then a "
        "copy of just those. null: everything trains.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute layers and logits again on the way back: less memory, up to half as much time more."
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Keep an exponential moving average of the weights after each update, with this decay an update; after the "
        "last one it becomes the run's last version. Samples to train on come from the weights themselves. null: none.",
    )
    schedule: Literal["auto", "linear", "constant"] = Field(
        "auto", description="auto: linear to 0 over `steps`; constant when the run has no end."
    )
    warmup_steps: Count = Field(
        0,
        description="Updates in which the rate rises to learning_rate: in the n-th it is n / warmup_steps of it. The schedule "
        "falls over the updates after them.",
    )
    optimizer: Literal["adam_tf", "adamw"] = Field(
        "adam_tf",
        description="adam_tf: Adam with TensorFlow's place of epsilon, which takes smaller first steps. adamw: torch's.",
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.999), description="Decay of the gradient's first and second moment; InstructGPT and TRLX have 0.9 and 0.95."
    )
    epsilon: Rate | None = Field(
        None,
        description="Of the optimizer. null: 1e-5, lm-human-preferences' for adam_tf, and for adamw too, where torch and TRL "
        "have 1e-8.",
    )
    weight_decay: Weight = Field(0.0, description="Of matrices; adamw alone has one.")
    gradient_norm: Rate | None = Field(
        None, description="Gradients of all that trains are scaled down to this norm together; null: they are not."
    )
    clip_ratio: Annotated[float, Field(gt=0)] = 0.2
    clip_value: Annotated[float, Field(gt=0)] = 0.2
    value_coefficient: Annotated[float, Field(ge=0)] = 0.1
    critic: Literal["shared", "separate"] = Field(
        "shared",
        description="Where values come from: a head on the policy, or a model of its own beside it. That starts from the run's "
        "reward model, where there is one with the policy's tokenizer, else from the policy's base.",
    )
    critic_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Of a separate critic, under the same schedule; null: learning_rate."
    )
    gamma: Share = 1.0
    lam: Share = 0.95
    importance_cap: Annotated[float, Field(ge=1)] = Field(2.0, description="Cap of the behaviour weight of a token.")
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    reward_normalisation: Literal["reference", "running", "none"] = "reference"
    kl: KlSettings = KlSettings()
    ptx: PretrainingMixSettings | None = Field(None, description="What is mixed into each update; null: nothing.")
    preferences: DirectPreferenceSettings = DirectPreferenceSettings()
    max_staleness: Annotated[int, Field(ge=0)] = Field(2, description="Versions; older rollouts are dropped and counted.")
    group_timeout_s: Seconds = Field(
        600.0, description="Where responses to one prompt train together, the rest of them is waited for so long."
    )
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
    microbatch_tokens: Positive = Field(8192, description="Tokens of one forward and backward pass at most; it bounds memory.")
    threads: Positive | None = Field(None, description="Compute threads on a CPU. Unset: all cores; four for a small model.")


class FineTuningSettings(Section):
    """Supervised fine-tuning on data.demonstrations, which makes the base model of the run."""

    seconds: Seconds | None = Field(None, description="Ends at the latest after so long; null: no limit.")
    epochs: Positive = Field(1, description="Passes over the demonstrations.")
    batch: Positive = Field(32, description="Demonstrations of one optimizer step.")
    microbatch_tokens: Positive = Field(8192, description="Tokens of one forward and backward pass at most; it bounds memory.")
    learning_rate: Rate = 1e-5
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="Share of the training in which the rate rises.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="Of matrices.")
    gradient_norm: Rate = Field(1.0, description="Gradients are scaled down to this norm.")
    append_end: bool = Field(True, description="A response ends with the end-of-text token, which is learned too.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Of the computation; weights stay float32.")
    threads: Positive | None = Field(None, description="Compute threads on a CPU. Unset: all cores; four for a small model.")


class RewardTrainingSettings(Section):
    """Reward-model training on the judgements of the preference service."""

    start_from: str | None = Field(
        None, description="Hugging Face model directory whose body the reward model is made of; null: the run's base model."
    )
    train: Literal["all", "adapters", "head"] = Field(
        "all",
        description="adapters: low-rank additions to the body's matrices, and the head; in the end a part of the weights. "
        "head: the body stays as it is and reads each text once; the best head is solved for, without a learning rate: minutes "
        "on little data. Both leave more of what a large model knew.",
    )
    adapter_rank: Positive = Field(8, description="Of each matrix's addition, with adapters.")
    adapter_alpha: Rate = Field(16.0, description="With adapters: an addition counts alpha / rank.")
    read: Literal["last", "mean"] = Field(
        "last", description="What the head reads: the state at the last token, or the mean of those of all tokens."
    )
    read_layers: tuple[Positive, ...] = Field(
        (), description="Layers, counted from 1, whose states the head reads side by side; empty: the last one that is kept."
    )
    ridge: Weight = Field(
        1e-3,
        description="Of the head alone: penalty on half its squared weights, of features with deviation 1. A wide head on few "
        "texts needs more.",
    )
    seconds: Seconds | None = Field(None, description="Ends at the latest after so long; null: no limit.")
    learning_rate: Rate = 1e-5
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="Share of the training in which the rate rises.")
    objective: Literal["ranked_pairs", "best_of_k", "scalar_compare"] = Field(
        "ranked_pairs",
        description="All pairs of a ranking (InstructGPT), or its best against the rest (lm-human-preferences). "
        "scalar_compare: only comparisons of which people said how much better; scores should differ by their margin.",
    )
    margin: Weight = Field(
        0.0,
        description="How far apart the scores of two responses should at least be of which people called one much better; a "
        "third and two thirds of it for slightly better and better. Llama 2 took 1 and 3.",
    )
    annotator_weights: dict[str, Weight] = Field(
        {}, description="How much the judgements of an annotator count, by name; 1 for those that are not named, 0 leaves out."
    )
    source_weights: dict[str, Weight] = Field({}, description="The same by the source of judgements; both are multiplied.")
    batch_texts: Annotated[int, Field(ge=2)] = Field(32, description="Different texts of one optimizer step.")
    microbatch_tokens: Positive = Field(2048, description="Tokens of one forward and backward pass at most; it bounds memory.")
    gradient_norm: Rate = Field(1.0, description="Gradients are scaled down to this norm.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Of the computation; weights stay float32.")
    embedding_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="Of matrices.")
    layers: Positive | None = Field(
        None, description="How many layers of the language model to keep; null keeps all that the head reads."
    )
    normalising_samples: Annotated[int, Field(ge=2)] = Field(
        256, description="Samples of the reference policy that set gain and bias."
    )
    threads: Positive | None = Field(
        None, description="Compute threads on a CPU. Unset: the cores that generation leaves; one of two for a small model."
    )

    @field_validator("read_layers")
    @classmethod
    def _different(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) < len(layers):
            raise ValueError("names a layer twice")
        return layers

    @model_validator(mode="after")
    def _differs(self) -> Self:
        if self.objective == "scalar_compare" and not self.margin:
            raise ValueError("objective scalar_compare needs margin: how far apart scores are of which one is much better")
        return self

    def weight(self, annotator: str, source: str) -> float:
        """How much a judgement of somebody counts."""
        return self.annotator_weights.get(annotator, 1.0) * self.source_weights.get(source, 1.0)
