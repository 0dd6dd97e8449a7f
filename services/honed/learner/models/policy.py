"""The policy with its values, and the frozen reference, as the learner reads them: action tokens in, numbers out.

Any causal language model of transformers serves. The transformer reads whole sequences; logits and
values are made at the states that predict an action token and nowhere else. Dropout is off: the
models stay in evaluation mode while they train.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from honed.kit.errors import FailedPrecondition
from honed.learner.data.batches import MicroBatch
from honed.learner.models.recompute import recompute_layers
from honed.learner.models.trained import Trained
from honed.models.attention import Precision, use_float32_attention
from honed.models.packed import use_packed_attention
from honed.models.packing import tokens_of
from honed.models.token_head import TokenHead, chosen_logprobs, chosen_logprobs_and_entropy

if TYPE_CHECKING:
    from honed.learner.models.critic import ValueModel


@dataclass(frozen=True)
class TokenEvaluation:
    """What the policy says of a micro-batch's action tokens, each `[N]`, float32."""

    logprobs: Tensor
    values: Tensor


@dataclass(frozen=True)
class TokenMeasurement(TokenEvaluation):
    """As `TokenEvaluation`, and with the entropy of each distribution in nats, without gradient."""

    entropies: Tensor


class Transformer(nn.Module):
    """A causal model of transformers that gives its last hidden states at action tokens."""

    def __init__(self, language_model: Any, *, precision: Precision = "float32", recompute: bool = False) -> None:
        """Takes the model over, with whatever head it has; it is set to evaluation mode and stays on its device.

        Args:
            language_model: a causal model of transformers.
            precision: see `Precision`.
            recompute: keep what enters each layer for the way back, and compute the rest again
                there: less memory, one more forward pass.

        Raises:
            FailedPrecondition: when it has no layers that can be computed again.
        """
        super().__init__()
        self.language_model = language_model.eval()
        self._precision, self._recompute = precision, recompute
        self.packed = use_packed_attention(language_model)
        """Whether it reads a micro-batch as one row, and so can share prompts; else sequences of equal length share a pass."""
        if not self.packed and precision == "bfloat16" and self.device.type == "cpu":
            use_float32_attention(language_model)
        if recompute:
            recompute_layers(language_model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """Last hidden states that predict an action token, `[N, d]` float32."""
        with self._autocast():
            hidden = self._read_packed(batch) if self.packed else self._read_runs(batch)
        chosen: Tensor = hidden.index_select(0, batch.states).float()
        return chosen

    def _read_packed(self, batch: MicroBatch) -> Tensor:
        """Last hidden states of all tokens, `[T, d]`, read as one row."""
        tokens, positions = batch.tokens.unsqueeze(0), batch.positions.unsqueeze(0)
        read = self.language_model.base_model(input_ids=tokens, position_ids=positions, use_cache=False, runs=batch.runs)
        hidden: Tensor = read.last_hidden_state.squeeze(0)
        return hidden

    def _read_runs(self, batch: MicroBatch) -> Tensor:
        """The same where attention is not known: sequences of equal length share a pass."""
        sizes = tokens_of(batch.runs)
        found: list[Tensor] = []
        for (count, _), tokens, positions in zip(
            batch.runs, torch.split(batch.tokens, sizes), torch.split(batch.positions, sizes), strict=True
        ):
            rows = {"input_ids": tokens.view(count, -1), "position_ids": positions.view(count, -1)}
            read = self.language_model.base_model(**rows, use_cache=False)
            found.append(read.last_hidden_state.flatten(0, 1))
        return torch.cat(found)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
            yield


def value_head(width: int) -> nn.Linear:
    """One number of a hidden state: exactly zero until it is trained, as in lm-human-preferences."""
    head: nn.Linear = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class TokenModel(Transformer):
    """A causal language model that gives log-probabilities of action tokens."""

    def __init__(self, language_model: Any, *, precision: Precision = "float32", recompute: bool = False) -> None:
        """See `Transformer`.

        Raises:
            FailedPrecondition: when the model is not causal, or does something to its logits that
                `TokenHead` does not know.
        """
        super().__init__(language_model, precision=precision, recompute=recompute)
        self._check_head()

    @property
    def vocabulary_size(self) -> int:
        """How many token ids the model knows."""
        return int(self.head.weight.shape[0])

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probability of each action token at its temperature, `[N]`, nats."""
        return chosen_logprobs(*self._at_actions(self.hidden_states(batch), batch), **self._way_back)

    def _at_actions(self, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, TokenHead, Tensor, Tensor]:
        return hidden, self.head, batch.targets, batch.temperatures

    @property
    def _way_back(self) -> dict[str, Any]:
        low = torch.bfloat16 if self._precision == "bfloat16" else torch.float32
        return {"backward_dtype": low, "keep": not self._recompute}

    @property
    def head(self) -> TokenHead:
        """How the model makes logits of its last hidden states; the tensors are its own."""
        return TokenHead.of(self.language_model)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Compares our logits with the model's own on two tokens, and the first state with and without the second token."""
        tokens = torch.tensor([[0, min(1, self.vocabulary_size - 1)]], device=self.device)
        name = type(self.language_model).__name__
        theirs = self.language_model(input_ids=tokens, use_cache=False).logits
        hidden = self.language_model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        if not torch.allclose(theirs.float(), self.head.logits(hidden).float(), rtol=1e-4, atol=1e-4):
            raise FailedPrecondition(
                f"{name} makes its logits in a way that the learner does not know; it knows one linear layer, a scale, and a "
                "soft cap: choose another model"
            )
        alone = self.language_model.base_model(input_ids=tokens[:, :1], use_cache=False).last_hidden_state
        if not torch.allclose(alone, hidden[:, :1], rtol=1e-3, atol=1e-3):
            raise FailedPrecondition(f"{name} reads what comes after a token too; only causal language models can be trained")


class ReferenceModel(TokenModel):
    """The frozen policy that the KL penalty is measured against."""

    def __init__(self, language_model: Any, *, precision: Precision = "float32") -> None:
        """Freezes the model; see `TokenModel`."""
        super().__init__(language_model, precision=precision)
        self.requires_grad_(False)

    def beside(self, policy: PolicyModel, batch: MicroBatch) -> tuple[TokenMeasurement, Tensor]:
        """What the policy says of a batch, and the reference's log-probabilities `[N]`, these without gradient."""
        with torch.no_grad():
            theirs = self.logprobs(batch)
        return policy.measure(batch), theirs


class TrainedModel(TokenModel, Trained):
    """A language model that a trainer moves, with what heads a subclass adds."""

    @property
    def published(self) -> nn.Module:
        """The language model."""
        model: nn.Module = self.language_model
        return model


class PolicyModel(TrainedModel):
    """The policy with values of its states: by a head on the same transformer, as in lm-human-preferences, or by a critic."""

    def __init__(
        self,
        language_model: Any,
        *,
        precision: Precision = "float32",
        recompute: bool = False,
        shared_trunk: bool = True,
        critic: ValueModel | None = None,
    ) -> None:
        """Takes the model over.

        Args:
            language_model: see `TokenModel`, as for the next two.
            precision: of the computation.
            recompute: whether layers are computed again on the way back.
            shared_trunk: whether the value loss also trains the transformer. False keeps its
                gradient in the head.
            critic: A model of its own for the values, on the same device. None adds a value head that is exactly zero.
        """
        super().__init__(language_model, precision=precision, recompute=recompute)
        self.critic = critic
        self.value_head = value_head(int(self.head.weight.shape[1])).to(self.device) if critic is None else None
        self._shared_trunk = shared_trunk

    def evaluate(self, batch: MicroBatch) -> TokenEvaluation:
        """Log-probabilities and values of the action tokens, with gradient."""
        hidden = self.hidden_states(batch)
        logprobs = chosen_logprobs(*self._at_actions(hidden, batch), **self._way_back)
        return TokenEvaluation(logprobs=logprobs, values=self._values(hidden, batch))

    def measure(self, batch: MicroBatch) -> TokenMeasurement:
        """As `evaluate`, and the entropies."""
        hidden = self.hidden_states(batch)
        logprobs, entropies = chosen_logprobs_and_entropy(*self._at_actions(hidden, batch), **self._way_back)
        return TokenMeasurement(logprobs=logprobs, values=self._values(hidden, batch), entropies=entropies)

    def _values(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        if self.critic is not None:
            return self.critic.values(batch)
        assert self.value_head is not None
        read = hidden if self._shared_trunk else hidden.detach()
        values: Tensor = self.value_head(read)
        return values.squeeze(-1)
