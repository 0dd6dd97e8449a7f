"""Trains a language model on texts: a tiny Llama from nothing, or any causal model further (supervised fine-tuning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.learner.data.batches import MicroBatch, pack_on
from honed.learner.data.continuation import Demonstration
from honed.learner.models.policy import TokenModel, TrainedModel
from honed.learner.settings import FineTuningSettings, PretrainSettings
from honed.learner.sources.texts import Batch
from honed.learner.supervised.fit import Budget
from honed.learner.train.algorithm import State, UpdateContext
from honed.learner.train.optimizer import decayed_matrices
from honed.learner.train.schedule import Rate, warmup_then_cosine
from honed.learner.train.trainer import Trainer, TrainSettings
from honed.models.attention import Precision
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


class NextToken:
    """The algorithm of pretraining and of supervised fine-tuning. Implements `Algorithm`.

    Its loss is the mean cross-entropy of the tokens of responses, `-log p(token | what stands before it)`, in nats: each token
    of a batch has the same weight.
    """

    def __init__(self, model: TokenModel) -> None:
        """Trains nothing by itself."""
        self.model = model

    def prepare(self, batch: Batch, context: UpdateContext) -> _Batch:
        """See `Algorithm`."""
        return _Batch(self.model, batch, context.microbatch_tokens)

    def state(self) -> State:
        """Nothing."""
        return {}

    def load_state(self, state: State) -> None:
        """Nothing."""


class _Batch:
    """Implements `Prepared`."""

    def __init__(self, model: TokenModel, items: Batch, microbatch_tokens: int) -> None:
        self._model, self._items, self._microbatch_tokens = model, items, microbatch_tokens
        self.loss, self.tokens = torch.zeros((), dtype=torch.float64, device=model.device), 0

    def __len__(self) -> int:
        """Its continuations."""
        return len(self._items)

    def minibatch(self, chosen: Sequence[int]) -> _Minibatch:
        """See `Prepared`."""
        packed = pack_on(self._model.device, self._items, chosen, self._microbatch_tokens)
        return _Minibatch(self._model, self, packed)

    def finish(self) -> Mapping[str, float]:
        """`loss`: nats a token, before the update. `tokens`: how many were learned."""
        return {"loss": float(self.loss) / self.tokens, "tokens": float(self.tokens)}


class _Minibatch:
    """Implements `Minibatch`."""

    def __init__(self, model: TokenModel, batch: _Batch, packed: Sequence[MicroBatch]) -> None:
        self._model, self._batch, self.micro_batches = model, batch, packed
        self.denominators = {"tokens": sum(len(micro.targets) for micro in packed)}

    def losses(self, micro: MicroBatch) -> Mapping[str, Tensor]:
        """See `Minibatch`."""
        loss = -self._model.logprobs(micro).sum()
        self._batch.loss += loss.detach()
        self._batch.tokens += len(micro.targets)
        return {"tokens": loss}

    def check(self) -> None:
        """A loss that is not finite has a gradient that is not, which the trainer refuses."""


def language_model_trainer(
    model: Any, section: PretrainSettings | FineTuningSettings, *, rng: torch.Generator, precision: Precision = "float32"
) -> Trainer[Batch, TrainedModel]:
    """A trainer of a causal language model of transformers: AdamW with betas 0.9 and 0.95, one step a batch."""
    trained = TrainedModel(model, precision=precision)
    groups = decayed_matrices(trained.trainable().values(), section.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=section.learning_rate, betas=(0.9, 0.95), fused=True)
    settings = TrainSettings(
        learning_rate=section.learning_rate,
        epochs=1,
        max_grad_norm=section.gradient_norm,
        microbatch_tokens=section.microbatch_tokens,
    )
    return Trainer(trained, NextToken(trained), optimizer, settings=settings, generator=rng)


def language_model_rate(section: PretrainSettings) -> Rate:
    """The learning rate that the settings ask for."""
    return warmup_then_cosine(section.learning_rate, warmup_steps=section.warmup_steps, final=section.final_rate)


def token_budget(section: PretrainSettings) -> Budget[Batch]:
    """The budget that the settings ask for: all tokens count, those of prompts too."""
    return Budget(section.tokens, lambda batch: sum(_length(item) for item in batch), section.seconds)


def _length(item: Demonstration) -> int:
    return len(item.prompt) + len(item.response)


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
