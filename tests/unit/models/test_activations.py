"""The fused GELU is the same function as the one that transformers writes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from honed.models.activations import fuse_activations
from honed.models.loader import load_language_model

# isort: split
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_accurate"])
def test_a_written_out_gelu_becomes_one_kernel_with_the_same_values_and_gradients(name: str) -> None:
    model = torch.nn.Sequential(ACT2FN[name])
    written_out = model[0]

    fuse_activations(model)

    assert isinstance(model[0], torch.nn.GELU)
    given = torch.linspace(-9, 9, 4001, dtype=torch.float64, requires_grad=True)
    results = [module(given) for module in (written_out, model)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(result.sum(), given)[0] for result in results]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gelu", "relu", "silu", "quick_gelu"])
def test_other_activations_stay(name: str) -> None:
    model = torch.nn.Sequential(ACT2FN[name])
    before = model[0]

    fuse_activations(model)

    assert model[0] is before


def test_a_loaded_model_says_what_transformers_says_and_keeps_its_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=16, vocab_size=30)).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.arange(12).unsqueeze(0)

    ours = load_language_model(tmp_path)

    assert any(isinstance(module, torch.nn.GELU) for module in ours.modules())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.config.activation_function == "gelu_new"
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-6)
