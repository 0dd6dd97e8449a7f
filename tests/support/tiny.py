"""A Llama small enough for tests, made on the fly, and what publishing it takes.

The tokenizer is byte-level without merges: any text encodes, token for byte, and decodes to itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from honed.artifacts.draft import VersionDraft
from honed.artifacts.manifest import Canary, Lineage, Manifest
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

EOS, BOS = "<eos>", "<bos>"


def make_tokenizer(directory: Path) -> int:
    """Writes tokenizer.json and tokenizer_config.json; returns the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {EOS: 0, BOS: 1}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, BOS])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "bos_token": BOS,
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)


def make_tiny_model(
    directory: Path,
    seed: int,
    *,
    width: int = 64,
    layers: int = 2,
    vocab_size: int | None = None,
    spread: float = 0.2,
    tied: bool = False,
) -> Path:
    """Writes a random Llama with its tokenizer as a Hugging Face model directory.

    Args:
        directory: Where; created.
        seed: Decides the weights. Two seeds differ by whole nats in their log-probabilities.
        width: Hidden size; a multiple of 32.
        layers: Number of layers.
        vocab_size: At least the tokenizer's 258; more makes the output layer larger.
        spread: Standard deviation of the initial weights: large enough that models differ, small enough for some entropy.
        tied: Whether the output layer is the embedding.

    Returns:
        `directory`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    used = make_tokenizer(directory)
    config = LlamaConfig(
        vocab_size=vocab_size or used,
        hidden_size=width,
        intermediate_size=width * 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=512,
        initializer_range=spread,
        eos_token_id=0,
        bos_token_id=1,
        tie_word_embeddings=tied,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return directory


def load(directory: Path) -> LlamaForCausalLM:
    """The model at `directory` under transformers, float32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(directory, dtype="float32").eval()


def token_logprobs(model: LlamaForCausalLM, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Log-probability of each token but the first given all before it, float32."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([list(token_ids)])).logits[0, :-1].float() / temperature
    picked = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(list(token_ids[1:]))[:, None])[:, 0]
    return [float(value) for value in picked]


def make_canaries(directory: Path, count: int = 2, length: int = 16) -> tuple[Canary, ...]:
    """Canaries of the model at `directory`, as a learner computes them."""
    model = load(directory)
    canaries = []
    for index in range(count):
        token_ids = tuple(2 + (7 * index + 13 * position) % 256 for position in range(length))
        canaries.append(Canary(token_ids, 1, tuple(token_logprobs(model, token_ids))))
    return tuple(canaries)


def publish_version(
    store: PolicyStore, directory: Path, version: VersionId, *, canaries: tuple[Canary, ...] | None = None
) -> Manifest:
    """Publishes the model at `directory`, with true canaries unless others are given."""
    lineage = Lineage(created_at="2026-01-01T00:00:00+00:00")
    return store.publish(directory, VersionDraft(version, make_canaries(directory) if canaries is None else canaries, lineage))
