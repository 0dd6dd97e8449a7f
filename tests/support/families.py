"""A tiny random model of each family that honed promises to train, with the byte-level tokenizer of `tiny`.

Sizes are small, everything that sets a family apart is kept: learned positions, biases, soft caps,
sliding windows, norms of queries and keys, tied embeddings, fused projections.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.support.tiny import make_tokenizer

POSITIONS: Final = 128


def _configurations() -> dict[str, Callable[[dict[str, Any]], Any]]:
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        GPT2Config,
        LlamaConfig,
        Phi3Config,
        PhiConfig,
        Qwen2Config,
        Qwen3Config,
    )

    gemma = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
    return {
        "gpt2": lambda base: GPT2Config(
            vocab_size=base["vocab_size"],
            n_embd=64,
            n_layer=3,
            n_head=2,
            n_positions=POSITIONS,
            initializer_range=base["initializer_range"],
            bos_token_id=1,
            eos_token_id=0,
        ),
        "llama": lambda base: LlamaConfig(**base, tie_word_embeddings=False),
        "qwen2": lambda base: Qwen2Config(**base, tie_word_embeddings=True),
        "qwen3": lambda base: Qwen3Config(**base, head_dim=32, tie_word_embeddings=True),
        # Caps low enough to bend what these weights give.
        "gemma2": lambda base: Gemma2Config(**base, **gemma, final_logit_softcapping=2.0, attn_logit_softcapping=1.0),
        "gemma3": lambda base: Gemma3TextConfig(**base, **gemma),
        "phi": lambda base: PhiConfig(**base),
        "phi3": lambda base: Phi3Config(**base),
    }


FAMILIES: Final = ("gpt2", "llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3")


def make_family_model(directory: Path, family: str, seed: int = 0, *, spread: float = 0.15) -> Path:
    """Writes a random model of the family as a Hugging Face directory; returns it.

    Args:
        directory: Where; created.
        family: One of `FAMILIES`.
        seed: Decides the weights.
        spread: Standard deviation of the initial weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    base = {
        "vocab_size": make_tokenizer(directory) + 6,  # real models have more rows than their tokenizers have tokens
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1 if family not in {"phi"} else 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": spread,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    config = _configurations()[family](base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            # Norms and biases start at 1 and 0 in every family; unlike ones would show a mistake.
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory
