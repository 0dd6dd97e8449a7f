"""A reward model: a language model's body and one linear head, read at the last token; saved for any Hugging Face reader.

It is transformers' own `...ForSequenceClassification` with one label. transformers finds a text's last token by looking for the
first pad token; here the lengths decide, and no pad token is configured: transformers then refuses to pool a padded batch
instead of pooling at the wrong place. Padding stands on the right of causal attention, so it changes no score.

A reward is `gain * head + bias`. When saved, the gain is multiplied into the head's weights; the head has no bias, so that goes
into the configuration as `reward_bias`. A reader that leaves it out gets the same rewards up to a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from honed.kit.errors import FailedPrecondition, InvalidArgument, NotFound
from honed.learner.texts import pad_right

_CHUNK = 16  # texts of about one length in one forward pass: little padding, still wide enough matrices


class RewardModel:
    """Scores token sequences. `gain` and `bias` are 1 and 0 until `normalise` sets them."""

    def __init__(self, classifier: Any, *, gain: float = 1.0, bias: float = 0.0) -> None:
        """Takes over a sequence classifier of transformers with one label and a linear head named `score`."""
        self._classifier = classifier.eval()
        self.gain = gain
        self.bias = bias

    @classmethod
    def from_language_model(cls, directory: Path, *, rng: torch.Generator, layers: int | None = None) -> RewardModel:
        """Body of the language model in `directory`; head drawn from N(0, 1/sqrt(d+1)) (lm-human-preferences).

        Args:
            directory: a Hugging Face directory with a causal language model.
            rng: of the head.
            layers: keep the body's first so many layers and drop the rest; None keeps all. On little data fewer generalise as
                well and train faster.

        Raises:
            NotFound: when the directory holds no model that can carry such a head.
            InvalidArgument: when it has fewer layers.
        """
        classifier = _load(directory)
        if layers is not None:
            body = classifier.base_model
            if not 1 <= layers <= len(body.layers):
                raise InvalidArgument("layers", f"the language model has {len(body.layers)}, cannot keep {layers}")
            body.layers = body.layers[:layers]
            classifier.config.num_hidden_layers = layers
            if getattr(classifier.config, "layer_types", None):
                classifier.config.layer_types = classifier.config.layer_types[:layers]
        with torch.no_grad():
            weight = classifier.score.weight
            weight.normal_(0.0, 1.0 / math.sqrt(weight.shape[1] + 1), generator=rng)
        return cls(classifier)

    @classmethod
    def load(cls, directory: Path) -> RewardModel:
        """Reads what `save` wrote.

        Raises:
            NotFound: when the directory holds no reward model.
        """
        classifier = _load(directory)
        return cls(classifier, bias=float(getattr(classifier.config, "reward_bias", 0.0)))

    def save(self, directory: Path, tokenizer: Any) -> None:
        """Writes configuration, float32 safetensors and the tokenizer; this object's own weights stay as they are.

        Raises:
            FailedPrecondition: when the directory cannot be written.
        """
        head: Tensor = self._classifier.score.weight
        unscaled = head.detach().clone()
        try:
            with torch.no_grad():
                head.mul_(self.gain)
            self._classifier.config.reward_bias = self.bias
            self._classifier.save_pretrained(directory, safe_serialization=True)
            tokenizer.save_pretrained(directory)
        except OSError as error:
            raise FailedPrecondition(f"{directory} cannot be written ({error}); free space or choose another one") from error
        finally:
            with torch.no_grad():
                head.copy_(unscaled)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What training moves."""
        yield from self._classifier.parameters()

    def raw_scores(
        self, sequences: Sequence[Sequence[int]], *, dropout: float = 0.0, rng: torch.Generator | None = None
    ) -> Tensor:
        """The head's value at the last token of each sequence, `[n]` float32, with gradients.

        Args:
            sequences: token ids, none empty; prompt and response together, the beginning-of-text token first.
            dropout: share of the embedding's components to drop.
            rng: of the dropout; needed when there is any.
        """
        if not all(sequences):
            raise InvalidArgument("sequences", "an empty sequence has no last token to read")
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [
            self._forward([sequences[i] for i in order[start : start + _CHUNK]], dropout, rng)
            for start in range(0, len(order), _CHUNK)
        ]
        back = torch.empty(len(order), dtype=torch.int64)
        back[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
        return torch.cat(scores)[back] if scores else torch.zeros(0)

    @torch.no_grad()
    def rewards(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """`gain * head + bias` of each sequence."""
        return [float(value) for value in self.raw_scores(sequences).double() * self.gain + self.bias]

    def normalise(self, samples: Sequence[Sequence[int]], *, mean: float = 0.0, std: float = 1.0) -> None:
        """Sets gain and bias so that the rewards of `samples` have this mean and population deviation.

        lm-human-preferences does so on 256 samples of the reference policy before and after training.

        Raises:
            InvalidArgument: with fewer than two samples, or when the model says the same of all.
        """
        if len(samples) < 2:
            raise InvalidArgument("samples", f"needs at least 2 samples to normalise by, got {len(samples)}")
        with torch.no_grad():
            scores = self.raw_scores(samples).double()
        spread = float(scores.std(correction=0))
        if not spread > 1e-8:
            raise InvalidArgument("samples", f"the deviation of their scores is {spread}: nothing to normalise by")
        self.gain = std / spread
        self.bias = mean - self.gain * float(scores.mean())

    def fold_gain(self) -> None:
        """Multiplies the gain into the head, so that training goes on from normalised scores."""
        with torch.no_grad():
            self._classifier.score.weight.mul_(self.gain)
        self.gain = 1.0

    def _forward(self, sequences: Sequence[Sequence[int]], dropout: float, rng: torch.Generator | None) -> Tensor:
        embedded = self._classifier.get_input_embeddings()(pad_right(sequences))
        if dropout:
            kept = torch.rand(embedded.shape, generator=rng) >= dropout
            embedded = embedded * kept / (1.0 - dropout)
        hidden = self._classifier.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        last = torch.tensor([len(sequence) - 1 for sequence in sequences])
        scores: Tensor = self._classifier.score(hidden[torch.arange(len(sequences)), last]).squeeze(-1)
        return scores.float()


def _load(directory: Path) -> Any:
    try:
        classifier = AutoModelForSequenceClassification.from_pretrained(
            directory,
            num_labels=1,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise NotFound(f"{directory} holds no model in safetensors that can score ({error})") from error
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise NotFound(f"{directory}: {type(classifier).__name__} has no linear head named `score`")
    return classifier
