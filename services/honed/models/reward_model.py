"""A reward model in Hugging Face form: a language model's body, one linear head on its states.

Where the head reads the last token of the last layer, as it does unless `models.pooling` says otherwise,
it is transformers' own `...ForSequenceClassification` with one label. transformers finds a text's last
token by looking for a pad token, and misses it when a policy samples that id; here the lengths
decide, and a model needs no pad token. Padding stands on the right of causal attention, so it
changes no score. The model stays in evaluation mode: its only dropout is that of `raw_scores`.

A reward is `gain * head + bias`. When saved, the gain is multiplied into the head's weights; the
head has no bias, so that goes into the configuration as `reward_bias`. A reader that leaves it out
gets the same rewards up to a constant.

A new head is drawn as in lm-human-preferences (Ziegler et al. 2019).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from honed.artifacts.files import hash_file
from honed.kit.errors import DataLoss, FailedPrecondition, InvalidArgument
from honed.models.attention import Precision, use_float32_attention
from honed.models.facts import ModelFacts, read_json
from honed.models.layers import keep_layers
from honed.models.loader import load_classifier
from honed.models.packing import pack
from honed.models.pooling import Pooling
from honed.models.tokenizer import copy_tokenizer

# What decides a score. A README or a training log beside them changes no version.
_DECIDING: Final = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")
_PASS_TOKENS: Final = 8192
_CPU = torch.device("cpu")
_AT_LAST: Final = Pooling()


class RewardModel:
    """Scores token sequences. `gain` and `bias` are 1 and 0 until `normalise` sets them."""

    def __init__(
        self,
        classifier: Any,
        *,
        gain: float = 1.0,
        bias: float = 0.0,
        max_tokens: int = 0,
        precision: Precision = "float32",
        pooling: Pooling = _AT_LAST,
    ) -> None:
        """Takes over a sequence classifier with one label and a linear head named `score`.

        Args:
            classifier: Of `load_classifier`; it stays on its device.
            gain: See the module.
            bias: See the module.
            max_tokens: The most tokens that it can read; 0 for no limit.
            precision: What the body computes in; weights and scores are float32.
            pooling: What the head reads.
        """
        self.classifier = classifier.eval()
        self.gain = gain
        self.bias = bias
        self.max_tokens = max_tokens
        self.pooling = pooling
        self.vocabulary_size = int(classifier.config.vocab_size)
        self._precision = precision
        if precision == "bfloat16" and self.device.type == "cpu":
            use_float32_attention(classifier)

    @classmethod
    def from_language_model(
        cls,
        directory: Path,
        *,
        rng: torch.Generator,
        layers: int | None = None,
        device: torch.device = _CPU,
        precision: Precision = "float32",
        pooling: Pooling = _AT_LAST,
    ) -> RewardModel:
        """Body of the language model in `directory`, head drawn from N(0, 1/sqrt(d+1)).

        Args:
            directory: A Hugging Face directory with a causal language model.
            rng: Of the head; on the host.
            layers: Keep the body's first so many layers and drop the rest; None keeps all that the
                head reads. On little data fewer generalise as well and train faster.
            device: Where it computes.
            precision: See `RewardModel`.
            pooling: See `RewardModel`.

        Raises:
            DataLoss: Files or weights are missing or damaged.
            FailedPrecondition: The model cannot carry such a head.
            InvalidArgument: It has fewer layers.
        """
        classifier = load_classifier(directory, device=device, new_head=True, head_width=pooling.width)
        highest = max(pooling.layers, default=None)
        if (kept := highest if layers is None else layers) is not None:
            depth = int(classifier.config.num_hidden_layers)
            if not 1 <= kept <= depth:
                raise InvalidArgument("reward_training.layers", f"the language model has {depth}, cannot keep {kept}")
            keep_layers(classifier, slice(kept))
        if highest is not None and kept is not None and highest > kept:
            raise InvalidArgument("reward_training.read_layers", f"there is no layer {highest} of the {kept} that are kept")
        with torch.no_grad():
            weight = classifier.score.weight
            weight.copy_(torch.empty(weight.shape).normal_(0.0, 1.0 / math.sqrt(weight.shape[1] + 1), generator=rng))
        longest = ModelFacts.read(directory).longest_sequence or 0
        return cls(classifier, max_tokens=longest, precision=precision, pooling=pooling)

    @classmethod
    def load(cls, directory: Path, *, device: torch.device = _CPU) -> RewardModel:
        """Reads what `save` wrote, or any classifier with one label and a head `score`.

        Raises:
            DataLoss: Files or weights are missing or damaged; names them.
            FailedPrecondition: It is no reward model.
        """
        config = read_json(directory / "config.json") if directory.is_dir() else {}
        labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
        if config and labels != 1:
            raise FailedPrecondition(f"{directory}/config.json: a reward model has one label, this one has {labels}")
        bias = config.get("reward_bias", 0.0)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
            raise DataLoss(f"{directory}/config.json: reward_bias is {bias!r}, it must be a finite number")
        pooling = Pooling.of_config(config, directory)
        classifier = load_classifier(directory, device=device, head_width=pooling.width)
        longest = ModelFacts.read(directory).longest_sequence or 0
        return cls(classifier, bias=float(bias), max_tokens=longest, pooling=pooling)

    def save(self, directory: Path, base: Path) -> None:
        """Writes configuration, float32 safetensors and the tokenizer files of `base`.

        Raises:
            FailedPrecondition: The directory cannot be written.
        """
        head: Tensor = self.classifier.score.weight
        unscaled = head.detach().clone()
        try:
            with torch.no_grad():
                head.mul_(self.gain)
            self.pooling.write(self.classifier.config)
            self.classifier.config.reward_bias = self.bias
            self.classifier.save_pretrained(directory)
            copy_tokenizer(base, directory)
        except OSError as error:
            raise FailedPrecondition(f"{directory} cannot be written ({error}); free space or choose another one") from error
        finally:
            with torch.no_grad():
                head.copy_(unscaled)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.classifier.score.weight.device
        return device

    def fitted(self, ids: Sequence[int], prefix: Sequence[int] = ()) -> tuple[list[int], int]:
        """As much of `ids` as the model can read, and how many tokens are left out.

        The end is kept: the whole response where it fits, and the end of the prompt. So is a
        beginning-of-text token, without which the model never saw a text.

        Args:
            ids: prompt and response together.
            prefix: what the tokenizer puts in front of a text.
        """
        excess = len(ids) - self.max_tokens if self.max_tokens else 0
        if excess <= 0:
            return list(ids), 0
        head = len(prefix) if tuple(ids[: len(prefix)]) == tuple(prefix) else 0
        return [*ids[:head], *ids[head + excess :]], excess

    def raw_scores(
        self, sequences: Sequence[Sequence[int]], *, dropout: float = 0.0, rng: torch.Generator | None = None
    ) -> Tensor:
        """The head's value of each sequence, `[n]` float32, in one pass; see `features`."""
        scores: Tensor = self.classifier.score(self.features(sequences, dropout=dropout, rng=rng)).squeeze(-1)
        return scores

    def features(
        self, sequences: Sequence[Sequence[int]], *, dropout: float = 0.0, rng: torch.Generator | None = None
    ) -> Tensor:
        """What the head reads of each sequence, `[n, width]` float32, in one pass.

        Args:
            sequences: Token ids, none empty; prompt and response together.
            dropout: Share of the embedding's components to drop.
            rng: Of the dropout, on the host; needed when there is any.

        Raises:
            InvalidArgument: A sequence is empty.
        """
        if not all(sequences):
            raise InvalidArgument("sequences", "an empty sequence has no last token to read")
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        width = int(lengths.max())
        tokens = torch.tensor([[*ids, *(0,) * (width - len(ids))] for ids in sequences], device=self.device)
        read: dict[str, Tensor] = {"input_ids": tokens}
        if dropout:
            embedded = self.classifier.get_input_embeddings()(tokens)
            kept = (torch.rand(embedded.shape, generator=rng) >= dropout).to(self.device)
            read = {"inputs_embeds": embedded * kept / (1.0 - dropout)}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
            return self.pooling.pooled(self.classifier.base_model, read, lengths.to(self.device))

    @torch.no_grad()
    def rewards(self, sequences: Sequence[Sequence[int]], *, pass_tokens: int = _PASS_TOKENS) -> list[float]:
        """`gain * head + bias` of each sequence; `pass_tokens` bounds one pass with its padding."""
        found = [0.0] * len(sequences)
        for rows in pack([len(sequence) for sequence in sequences], pass_tokens):
            scores = self.raw_scores([sequences[row] for row in rows]).double().cpu()
            for row, score in zip(rows, scores.tolist(), strict=True):
                found[row] = score * self.gain + self.bias
        return found

    def normalise(self, samples: Sequence[Sequence[int]], *, mean: float = 0.0, std: float = 1.0) -> None:
        """Sets gain and bias so that `samples` have this mean and population deviation.

        lm-human-preferences does so on 256 samples of the reference policy before and after
        training.

        Raises:
            InvalidArgument: With fewer than two samples, or when the model says the same of all.
        """
        if len(samples) < 2:
            raise InvalidArgument("samples", f"needs at least 2 samples to normalise by, got {len(samples)}")
        self.gain, self.bias = 1.0, 0.0
        scores = torch.tensor(self.rewards(samples), dtype=torch.float64)
        spread = float(scores.std(correction=0))
        if not spread > 1e-8:
            raise InvalidArgument("samples", f"the deviation of their scores is {spread}: nothing to normalise by")
        self.gain = std / spread
        self.bias = mean - self.gain * float(scores.mean())

    def fold_gain(self) -> None:
        """Multiplies the gain into the head, so that training goes on from normalised scores."""
        with torch.no_grad():
            self.classifier.score.weight.mul_(self.gain)
        self.gain = 1.0


def reward_model_version(directory: Path) -> str:
    """A sha256 over the digests of configuration, tokenizer and weights."""
    paths = sorted({*(directory / name for name in _DECIDING), *directory.glob("*.safetensors")})
    listing = "".join(f"{hash_file(path)[1]}  {path.name}\n" for path in paths if path.is_file())
    return hashlib.sha256(listing.encode()).hexdigest()
