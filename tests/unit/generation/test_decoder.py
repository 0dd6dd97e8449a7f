"""Claims about the decoder on transformers: what steps together is what it would be alone, and padding stays small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from honed.artifacts.version import VersionId
from honed.generation.hf.decoder import Decoder, _passes
from honed.generation.hf.row import Row, make_row
from honed.generation.requests import EngineRequest, Sampling

VOCABULARY = 61


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
        config = transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **small)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
        config = transformers.Gemma2Config(vocab_size=VOCABULARY, num_key_value_heads=1, sliding_window=8, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def row(prompt: list[int], tokens: int, temperature: float = 0.0) -> Row:
    sampling = Sampling(tokens, temperature=temperature, seed=sum(prompt), fixed_length=True)
    request = EngineRequest("r", prompt, sampling, want_text=False)
    return make_row(request, lambda ids: "", torch.Generator().manual_seed(sum(prompt)))


def decoder_of(model: Any) -> Decoder:
    return Decoder(model, VersionId(1, 1), frozenset(), max_batch=8)


def drained(decoder: Decoder, arrivals: list[list[Row]]) -> list[int]:
    """Steps until all rows are done, of which some come before each of the first steps; how many cohorts there were then."""
    cohorts = []
    waiting = list(arrivals)
    while waiting or decoder.busy:
        decoder.step(waiting.pop(0) if waiting else [])
        cohorts.append(len(decoder._cohorts))
    return cohorts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_rows_that_come_one_after_another_get_what_they_get_alone(kind: str, temperature: float) -> None:
    """Some are short and leave early, so that the padding on the left changes."""
    model = model_of(kind)
    shapes = [(30, 3), (5, 20), (7, 9), (12, 15), (4, 6), (26, 12)]
    prompts = [[1 + (7 * i + j) % (VOCABULARY - 1) for j in range(length)] for i, (length, _) in enumerate(shapes)]

    def rows() -> list[Row]:
        return [row(prompt, tokens, temperature) for prompt, (_, tokens) in zip(prompts, shapes, strict=True)]

    alone = rows()
    for one in alone:
        drained(decoder_of(model), [[one]])
    together = rows()
    drained(decoder_of(model), [together[:2], together[2:3], [], together[3:]])
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_rows_of_like_length_share_a_cache_whenever_they_came() -> None:
    assert max(drained(decoder_of(model_of("gpt2")), [[row([i] * (8 + i), 12)] for i in range(1, 7)])) == 1


def test_a_long_prompt_does_not_pad_the_short_ones() -> None:
    decoder = decoder_of(model_of("gpt2"))
    cohorts = drained(decoder, [[row([1] * 200, 6), *(row([i] * 5, 12) for i in range(2, 7))]])
    assert cohorts[0] == 2


def test_a_pass_reads_no_more_tokens_than_it_may() -> None:
    """But for a prompt that is longer: it has a pass of its own."""
    rows = [row([i] * length, 4) for i, length in enumerate([20, 18, 16, 16, 14, 65], 1)]
    passes = list(_passes(rows, 48))
    assert [sorted(one.length for one in part) for part in passes] == [[14, 16, 16], [18, 20], [65]]
    assert sorted(id(one) for part in passes for one in part) == sorted(map(id, rows))


def test_what_leaves_takes_its_padding_along() -> None:
    decoder = decoder_of(model_of("gpt2"))
    short = row([2] * 20, 10)
    decoder.step([row([1] * 28, 2), short])
    assert decoder._cohorts[0].mask.shape[1] == 28
    decoder.step([])
    [cohort] = decoder._cohorts
    assert cohort.mask.shape == (1, 21)
    assert {layer.keys.shape[2] for layer in cohort.cache.layers} == {21}
