"""Trains a language model on texts: a tiny Llama from nothing, or any causal model further (supervised fine-tuning).

One loop for both; `texts` makes the batches and masks the prompt where only the response has a
loss. The budget is in tokens, and optionally in seconds: the learning rate then falls by whichever
budget is nearer its end, so that a slow machine ends with a finished schedule too. Without a limit
in seconds the result depends on nothing but settings, data and seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.learner.data.texts import IGNORED, TokenBatch
from honed.models.new_tokenizer import END_OF_TEXT_ID

_SUPPORTED_HEADS = (32, 64, 128)  # head sizes that vLLM's attention kernels take on every platform


@dataclass(frozen=True)
class ModelShape:
    """The size of a Llama with tied embeddings."""

    hidden_size: int
    layers: int
    head_size: int
    max_length: int

    def __post_init__(self) -> None:
        """Checks that vLLM can serve this shape."""
        if self.head_size not in _SUPPORTED_HEADS:
            raise InvalidArgument("head_size", f"vLLM serves heads of {_SUPPORTED_HEADS}, not {self.head_size}")
        if self.hidden_size % self.head_size or self.hidden_size < self.head_size:
            raise InvalidArgument("hidden_size", f"{self.hidden_size} is no multiple of the head size {self.head_size}")
        if self.layers < 1 or self.max_length < 2:
            raise InvalidArgument("layers, max_length", f"too small: {self.layers}, {self.max_length}")


@dataclass(frozen=True)
class PretrainSettings:
    """How long and how fast to train. Nothing has a default here: the run file's section is where defaults stand.

    Attributes:
        tokens: training stops after this many, counting padding.
        learning_rate: its peak, reached over `warmup_steps`; it then falls along half a cosine to
            `final_rate` of the peak.
        weight_decay: of matrices; gains of norms do not decay.
        gradient_norm: gradients are scaled down to this norm.
        max_seconds: training also stops after this time; None for a run that must repeat exactly.
    """

    tokens: int
    learning_rate: float
    max_seconds: float | None
    warmup_steps: int
    final_rate: float
    weight_decay: float
    gradient_norm: float

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.tokens < 1:
            raise InvalidArgument("tokens", f"must be positive, got {self.tokens}")
        if not 0 < self.learning_rate < 1 or not 0 <= self.final_rate <= 1:
            raise InvalidArgument("learning_rate, final_rate", f"out of range: {self.learning_rate}, {self.final_rate}")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise InvalidArgument("max_seconds", f"must be positive, got {self.max_seconds}")


@dataclass(frozen=True)
class TrainingProgress:
    """Where a training job stands after a step; `done` is the share of its budget that is used, 0 to 1."""

    step: int
    loss: float
    tokens: int
    tokens_per_second: float
    done: float


@dataclass(frozen=True)
class TrainingOutcome:
    """What came out: `loss` is the mean over the last tenth of the steps, in nats a token."""

    steps: int
    tokens: int
    loss: float
    seconds: float
    stopped_by: Literal["tokens", "seconds"]


def new_language_model(shape: ModelShape, *, vocabulary_size: int, rng: torch.Generator) -> LlamaForCausalLM:
    """A Llama with random weights drawn from `rng`: matrices N(0, 0.02), norms 1. No pad token is configured.

    The feed-forward width is 8/3 of the hidden size rounded up to a multiple of 32, as Llama has
    it.
    """
    heads = shape.hidden_size // shape.head_size
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=shape.hidden_size,
        intermediate_size=-(-shape.hidden_size * 8 // 3 // 32) * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.02, generator=rng)
    return model


def language_model_loss(model: Any, batch: TokenBatch) -> torch.Tensor:
    """Mean cross-entropy of the next token over the positions that have a loss, in nats."""
    logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)


def train_language_model(
    model: Any,
    batches: Iterator[TokenBatch],
    settings: PretrainSettings,
    *,
    progress: Callable[[TrainingProgress], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainingOutcome:
    """Trains `model` in place with AdamW (betas 0.9, 0.95) until the budget is used up; leaves it in evaluation mode.

    Args:
        model: a causal language model of transformers, in float32.
        batches: without end, all of about the same size; see `texts`.
        settings: budget and rates.
        progress: called after every step; raising from it ends the training.
        clock: seconds; for `max_seconds` and the rates that are reported.

    Raises:
        FailedPrecondition: when the loss is no longer finite; the message names the step and what
            to try.
    """
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    model.train()
    started, step, tokens, done = clock(), 0, 0, 0.0
    losses: list[float] = []
    while done < 1.0:
        rate = settings.learning_rate * _rate_factor(step, done, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(batches)
        loss = language_model_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + batch.tokens.numel()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FailedPrecondition(f"the loss is {losses[-1]} at step {step}; lower the learning rate ({rate:.2g} now)")
        elapsed = clock() - started
        done = min(1.0, max(tokens / settings.tokens, elapsed / settings.max_seconds if settings.max_seconds else 0.0))
        progress(TrainingProgress(step, losses[-1], tokens, tokens / max(elapsed, 1e-9), done))
    model.eval()
    last = losses[-max(1, step // 10) :]
    stopped_by: Literal["tokens", "seconds"] = "tokens" if tokens >= settings.tokens else "seconds"
    return TrainingOutcome(step, tokens, sum(last) / len(last), clock() - started, stopped_by)


def save_language_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes a complete Hugging Face directory: float32 safetensors, configuration, tokenizer of transformers.

    Raises:
        FailedPrecondition: when the directory cannot be written.
    """
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except OSError as error:
        raise FailedPrecondition(f"{directory} cannot be written ({error}); free space or choose another one") from error


def _rate_factor(step: int, done: float, settings: PretrainSettings) -> float:
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    return warmup * (settings.final_rate + (1.0 - settings.final_rate) * 0.5 * (1.0 + math.cos(math.pi * done)))
