"""The task that both sides learn: same model, prompts and planted reward. Only torch, transformers and tokenizers are imported.

The model's 256 tokens are words of three letters. A response is worth the share of its words that begin with a vowel, which a
random model reaches 5 times in 26.
"""

from __future__ import annotations

import itertools
import json
import random
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

VOCABULARY, PROMPT_TOKENS, PROMPTS = 256, 8, 512
PEER_BATCH = 8
"""Responses that TRL reads at once on a device unless told otherwise."""
END = "<|end|>"
_VOWELS = frozenset("aeiou")
_MAX_TOKENS = 128


@dataclass(frozen=True)
class Task:
    """What is trained, as both sides read it.

    Attributes:
        model: Directory of the model and its tokenizer.
        prompts: File of JSON lines with `text`.
        algorithm: What learns.
        tokens: Of each response, always so many.
        batch: Responses of an update.
        group: Responses to one prompt.
        epochs: Passes over a batch.
        learning_rate: AdamW's, constant.
        kl: Price of a nat to the reference model; 0 needs none.
        seconds: How long to train from the end of the first update on.
        threads: Compute threads of the peer's process.
        own_cores: Cores that honed's learner has to itself; 0 for none.
        as_it_comes: Whether the peer keeps its own settings where the task says nothing.
        precision: Of both trainers' passes.
        seed: Of order and sampling.
    """

    model: str
    prompts: str
    algorithm: Literal["ppo", "grpo"]
    tokens: int
    batch: int
    group: int
    epochs: int
    learning_rate: float
    kl: float
    seconds: float
    threads: int
    own_cores: int
    as_it_comes: bool
    precision: Literal["float32", "bfloat16"]
    seed: int

    @classmethod
    def read(cls, file: Path) -> Task:
        """What `write` wrote."""
        return cls(**json.loads(file.read_text()))

    def write(self, file: Path) -> None:
        """For the peer's process."""
        file.write_text(json.dumps(asdict(self)))


def words() -> list[str]:
    """The words of the vocabulary, by their token ids; the end of text is id 0."""
    letters = string.ascii_lowercase
    every = ("".join(word) for word in itertools.product(letters, letters, letters))
    # Steps of a number without a divisor in common with 26**3: first letters come about equally often.
    return [END, *itertools.islice(itertools.islice(every, 0, None, 67), VOCABULARY - 1)]


def score(text: str) -> float:
    """Share of the words that begin with a vowel; 0 of no words."""
    found = text.split()
    return sum(word[0] in _VOWELS for word in found) / len(found) if found else 0.0


def vowel_share(samples: Sequence[Any]) -> list[float]:
    """`score` of each response, as an entry point of `honed.scorers`."""
    return [score(sample.response) for sample in samples]


def make_prompts(file: Path, seed: int) -> None:
    """Writes random prompts of `PROMPT_TOKENS` words."""
    rng, known = random.Random(seed), words()[1:]
    rows = (json.dumps({"text": " ".join(rng.choices(known, k=PROMPT_TOKENS))}) for _ in range(PROMPTS))
    file.write_text("".join(row + "\n" for row in rows))


def make_model(directory: Path, shape: Literal["gpt2", "llama"], seed: int) -> None:
    """Writes a random model and its tokenizer: GPT-2 of 2 layers of 128, or Llama of 4 layers of 256."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    ends: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    model: Any
    if shape == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=128, n_head=4, n_positions=_MAX_TOKENS, **ends))
    else:
        heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
        size = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 688, "max_position_embeddings": _MAX_TOKENS}
        model = LlamaForCausalLM(LlamaConfig(**size, **heads, **ends))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words())}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(directory)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=_MAX_TOKENS)
    fast.save_pretrained(directory)
