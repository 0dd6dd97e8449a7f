"""Scorers that a test steers, and a tiny reward model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.tiny import make_tokenizer

from honed.kit.errors import DataLoss
from honed.models.chat import ChatTemplate
from honed.reward.scorer import Kind, ScorerInput, ScorerOutput


class ByteTokenizer:
    """Token ids are the text's bytes; 256 begins a text."""

    digest = "bytes"
    prefix = (256,)
    template = ChatTemplate("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}", {})

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        return [*(self.prefix if special_tokens else ()), *text.encode()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


TOKENIZER = ByteTokenizer()


def item(response: str | Sequence[int], prompt: str | Sequence[int] | None = None) -> ScorerInput:
    """An input of text or of token ids."""
    return ScorerInput(
        TOKENIZER,
        prompt_tokens=tuple(prompt) if prompt is not None and not isinstance(prompt, str) else None,
        prompt=prompt if isinstance(prompt, str) else None,
        response_tokens=None if isinstance(response, str) else tuple(response),
        response=response if isinstance(response, str) else None,
    )


def as_number(text: str) -> float:
    """What the fake scorer makes of a response."""
    if text == "raise":
        raise ValueError("told to")
    return float(text)


class FakeScorer:
    """Reads the response as a number. Notes its batches; holds each one while the gate is closed."""

    kind: Kind = "reward_model"
    max_tokens = 0
    longest_s = 0.0

    def __init__(self, name: str = "fake", version: str = "v1", value: Callable[[str], float] = as_number) -> None:
        self.name = name
        self.version = version
        self.batches: list[list[str]] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self._value = value
        self.sees: Callable[[ScorerInput], str] = lambda _: ""
        """What of each sample to note in `prompts`."""
        self.prompts: list[str] = []

    def score(self, batch: Sequence[ScorerInput]) -> list[ScorerOutput]:
        self.prompts.extend([self.sees(sample) for sample in batch])
        self.batches.append([sample.response_text for sample in batch])
        self.entered.set()
        assert self.gate.wait(20)
        return [ScorerOutput(self._value(sample.response_text)) for sample in batch]


def make_reward_model(
    directory: Path, seed: int = 0, *, bias: float | None = None, positions: int = 128, labels: int = 1, pad: int | None = None
) -> Path:
    """Writes a random Llama reward model with the byte-level tokenizer of the tiny policy."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=make_tokenizer(directory),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.08,
        num_labels=labels,
        pad_token_id=pad,
        dtype="float32",
    )
    if bias is not None:
        config.reward_bias = bias
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(directory)
    return directory


def make_version(directory: Path, version: str) -> Path:
    """The least that can be published as a reward model; `read_version` gives `version` back."""
    import numpy
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"version": version}))
    (directory / "tokenizer.json").write_text("{}")
    save_file({"score.weight": numpy.zeros((1, 2), numpy.float32)}, directory / "model.safetensors")
    return directory


def read_version(directory: Path) -> str:
    """What `make_version` wrote.

    Raises:
        DataLoss: The directory does not hold it.
    """
    try:
        version: str = json.loads((directory / "config.json").read_text())["version"]
    except (OSError, KeyError) as error:
        raise DataLoss(f"{directory} is damaged") from error
    return version


def edit_config(directory: Path, **changes: object) -> None:
    """Changes keys of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
