"""A reward model in Hugging Face form as a scorer: `honed.models.reward_model` behind the port."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from honed.artifacts.files import hash_file
from honed.models.reward_model import RewardModel, reward_model_version
from honed.models.tokenizer import TOKENIZER_FILES, load_tokenizer, render_chat, tokenizer_digest
from honed.reward.scorer import BadSample, Kind, ScorerFailed, ScorerInput, ScorerOutput, ScoringTokenizer


class ModelScorer:
    """One loaded reward model. Its directory may go away after the load."""

    longest_s = 0.0
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
        self.tokens_as = _tokenizer_files(directory) if self._own_tokenizer else ""
        """Models that are equal in this, and see the same, make the same tokens of a sample; empty for the policy's own."""
        self.max_tokens = self._model.max_tokens
        self._sees_prompt = sees_prompt
        self._batch_tokens = batch_tokens

    def score(self, batch: Sequence[ScorerInput]) -> list[ScorerOutput]:
        """See `Scorer`."""
        return self.score_tokens(self.tokens(batch))

    def tokens(self, batch: Sequence[ScorerInput]) -> list[list[int]]:
        """Each sample whole, in this model's tokens.

        Raises:
            BadSample: A sample has no token.
        """
        return [self._tokens(sample, index) for index, sample in enumerate(batch)]

    def score_tokens(self, tokens: Sequence[Sequence[int]]) -> list[ScorerOutput]:
        """Scores what `tokens` gave, of this model or of one with the same `tokens_as`.

        Raises:
            ScorerFailed: The forward pass failed, or a token is not in this model's vocabulary.
        """
        sequences: list[list[int]] = []
        truncated: list[int] = []
        for index, whole in enumerate(tokens):
            self._check(whole, index)
            ids, left_out = self._model.fitted(whole, self._tokenizer.prefix)
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
        return ids

    def _check(self, ids: Sequence[int], index: int) -> None:
        if max(ids) >= self._model.vocabulary_size:
            # On a GPU such an id would take the whole process down.
            raise BadSample(
                self.name,
                self.version,
                f"token id {max(ids)} is outside the vocabulary of {self._model.vocabulary_size}",
                index,
            )

    def _own_prompt(self, sample: ScorerInput) -> list[int]:
        """The prompt in this model's own tokens, a conversation by its own chat template where it has one."""
        if sample.messages is not None and self._tokenizer.template is not None:
            return render_chat(self._tokenizer, sample.messages, field="prompt.messages")
        return self._tokenizer.encode(sample.prompt_text, special_tokens=True) if sample.prompt_text else []


def _tokenizer_files(directory: Path) -> str:
    """A digest of everything that decides on a model's tokens, its chat template included."""
    present = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    return hashlib.sha256("".join(f"{path.name} {hash_file(path)[1]}\n" for path in present).encode()).hexdigest()
