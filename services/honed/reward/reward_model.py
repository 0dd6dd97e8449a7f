"""A reward model in Hugging Face format as a scorer: the value of its head at the last token of prompt and response.

Formula: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences" (the reward is read at the last token).
A model that honed trained has its gain in the head's weights and its bias as `reward_bias` in its configuration.

transformers' own pooling looks for that token by comparing ids with a padding id, and misses it when a policy samples that id.
Here the lengths decide, so no id means anything and a model needs no padding token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from honed.reward.codec import HfCodec, tokenizer_digest
from honed.reward.model_files import check_model, load_model, model_version, reward_bias
from honed.reward.packing import pack
from honed.reward.scorer import BadSample, Kind, ScorerFailed, ScorerInput, ScorerOutput, TokenCodec


class RewardModel:
    """One loaded reward model. Its directory may go away after the load."""

    kind: Kind = "reward_model"

    def __init__(
        self,
        name: str,
        directory: Path,
        policy: TokenCodec,
        *,
        sees_prompt: bool = True,
        batch_tokens: int = 8192,
        device: str = "cpu",
    ) -> None:
        """Loads and checks a model directory: config.json, safetensors, tokenizer.json.

        Args:
            name: The scorer's name in the settings.
            directory: A model with one linear output named `score`, as AutoModelForSequenceClassification with one label has.
            policy: The policy's tokenizer. A model with the same one takes token ids as they are; for a model with another one
                the text is tokenised again.
            sees_prompt: Whether it reads the prompt too.
            batch_tokens: Tokens of one forward pass at most, padding included (a longer single sample passes alone).
            device: Where it runs.

        Raises:
            DataLoss: Files are missing or damaged.
            FailedPrecondition: It is no reward model that honed can serve; says why.
        """
        check_model(directory)
        self.name = name
        self.version = model_version(directory)
        self._own_tokenizer = tokenizer_digest(directory) != policy.digest
        self._codec: TokenCodec = HfCodec(directory) if self._own_tokenizer else policy
        self._model = load_model(directory).to(device)
        config = self._model.config.get_text_config()
        self.max_tokens = int(getattr(config, "max_position_embeddings", 0) or 0)
        self._vocabulary = int(config.vocab_size)
        self._bias = reward_bias(self._model.config, directory)
        self._sees_prompt = sees_prompt
        self._batch_tokens = batch_tokens
        self._device = torch.device(device)

    def score(self, batch: Sequence[ScorerInput]) -> list[ScorerOutput]:
        """See `Scorer`."""
        sequences: list[list[int]] = []
        truncated: list[int] = []
        for index, sample in enumerate(batch):
            ids, left_out = self._fitted(self._tokens(sample, index))
            sequences.append(ids)
            truncated.append(left_out)
        values = [0.0] * len(batch)
        for rows in pack([len(ids) for ids in sequences], self._batch_tokens):
            for row, value in zip(rows, self._forward([sequences[row] for row in rows]).tolist(), strict=True):
                values[row] = value + self._bias
        return [ScorerOutput(value, left_out) for value, left_out in zip(values, truncated, strict=True)]

    def _tokens(self, sample: ScorerInput, index: int) -> list[int]:
        codec = self._codec
        if self._own_tokenizer:
            prompt = codec.encode(sample.prompt_text, special_tokens=True) if self._sees_prompt and sample.prompt_text else []
            ids = [*(prompt or codec.prefix), *codec.encode(sample.response_text, special_tokens=False)]
        else:
            prompt_ids = sample.prompt_ids if self._sees_prompt else ()
            # A response without a prompt is a text that stands alone: it begins as every text does.
            ids = [*(prompt_ids or codec.prefix), *sample.response_ids]
        if not ids:
            raise BadSample(self.name, self.version, "there is nothing to read: no token", index)
        if max(ids) >= self._vocabulary:
            # On a GPU such an id would take the whole process down.
            raise BadSample(
                self.name, self.version, f"token id {max(ids)} is outside the vocabulary of {self._vocabulary}", index
            )
        return ids

    def _fitted(self, ids: list[int]) -> tuple[list[int], int]:
        """As much as the model can read, and how many tokens are left out.

        The end is kept: the whole response where it fits, and the end of the prompt. So is the beginning-of-text token, without
        which the model never saw a text.
        """
        excess = len(ids) - self.max_tokens if self.max_tokens else 0
        if excess <= 0:
            return ids, 0
        head = len(self._codec.prefix) if tuple(ids[: len(self._codec.prefix)]) == self._codec.prefix else 0
        return ids[:head] + ids[head + excess :], excess

    @torch.inference_mode()
    def _forward(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The head's value at the last token of each sequence, `[len(sequences)]`, float32."""
        lengths = [len(ids) for ids in sequences]
        width = max(lengths)
        tokens = torch.tensor([[*ids, *(0,) * (width - len(ids))] for ids in sequences], device=self._device)
        last = torch.tensor(lengths, device=self._device) - 1
        mask = None
        if min(lengths) < width:
            mask = (torch.arange(width, device=self._device) <= last.unsqueeze(1)).long()
        try:
            hidden = self._model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
            at_last = hidden[torch.arange(len(lengths), device=self._device), last]
            value: Tensor = self._model.score(at_last).squeeze(-1).float()
        except RuntimeError as error:
            raise ScorerFailed(self.name, self.version, f"the forward pass failed: {error}") from error
        return value
