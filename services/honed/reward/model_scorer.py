"""A reward model in Hugging Face form as a scorer: `honed.models.reward_model` behind the port."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from honed.models.reward_model import RewardModel, reward_model_version
from honed.models.tokenizer import load_tokenizer, render_chat, tokenizer_digest
from honed.reward.scorer import BadSample, Kind, ScorerFailed, ScorerInput, ScorerOutput, ScoringTokenizer


class ModelScorer:
    """One loaded reward model. Its directory may go away after the load."""

    kind: Kind = "reward_model"

    def __init__(
        self,
        name: str,
        directory: Path,
        policy: ScoringTokenizer,
        *,
        sees_prompt: bool = True,
        batch_tokens: int = 8192,
        device: str = "cpu",
    ) -> None:
        """Loads and checks a model directory: config.json, safetensors, tokenizer.json.

        Args:
            name: The scorer's name in the settings.
            directory: A model with one linear output named `score`, as
                AutoModelForSequenceClassification with one label has.
            policy: The policy's tokenizer. A model with the same one takes token ids as they are;
                for a model with another one the text is tokenised again.
            sees_prompt: Whether it reads the prompt too.
            batch_tokens: Tokens of one forward pass at most, padding included (a longer single
                sample passes alone).
            device: Where it runs.

        Raises:
            DataLoss: Files are missing or damaged.
            FailedPrecondition: It is no reward model that honed can serve; says why.
        """
        self._model = RewardModel.load(directory, device=torch.device(device))
        self.name = name
        self.version = reward_model_version(directory)
        self._own_tokenizer = tokenizer_digest(directory) != policy.digest
        self._tokenizer: ScoringTokenizer = load_tokenizer(directory) if self._own_tokenizer else policy
        self.max_tokens = self._model.max_tokens
        self._sees_prompt = sees_prompt
        self._batch_tokens = batch_tokens

    def score(self, batch: Sequence[ScorerInput]) -> list[ScorerOutput]:
        """See `Scorer`."""
        sequences: list[list[int]] = []
        truncated: list[int] = []
        for index, sample in enumerate(batch):
            ids, left_out = self._model.fitted(self._tokens(sample, index), self._tokenizer.prefix)
            sequences.append(ids)
            truncated.append(left_out)
        try:
            values = self._model.rewards(sequences, pass_tokens=self._batch_tokens)
        except RuntimeError as error:
            raise ScorerFailed(self.name, self.version, f"the forward pass failed: {error}") from error
        return [ScorerOutput(value, left_out) for value, left_out in zip(values, truncated, strict=True)]

    def _tokens(self, sample: ScorerInput, index: int) -> list[int]:
        tokenizer = self._tokenizer
        if self._own_tokenizer:
            prompt = self._own_prompt(sample) if self._sees_prompt else []
            ids = [*(prompt or tokenizer.prefix), *tokenizer.encode(sample.response_text, special_tokens=False)]
        else:
            prompt_ids = sample.prompt_ids if self._sees_prompt else ()
            # A response without a prompt is a text that stands alone: it begins as every text does.
            ids = [*(prompt_ids or tokenizer.prefix), *sample.response_ids]
        if not ids:
            raise BadSample(self.name, self.version, "there is nothing to read: no token", index)
        if max(ids) >= self._model.vocabulary_size:
            # On a GPU such an id would take the whole process down.
            raise BadSample(
                self.name,
                self.version,
                f"token id {max(ids)} is outside the vocabulary of {self._model.vocabulary_size}",
                index,
            )
        return ids

    def _own_prompt(self, sample: ScorerInput) -> list[int]:
        """The prompt in this model's own tokens, a conversation by its own chat template where it has one."""
        if sample.messages is not None and self._tokenizer.template is not None:
            return render_chat(self._tokenizer, sample.messages, field="prompt.messages")
        return self._tokenizer.encode(sample.prompt_text, special_tokens=True) if sample.prompt_text else []
