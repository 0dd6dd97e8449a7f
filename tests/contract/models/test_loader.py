"""The one loader fills nothing in and leaves nothing out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.families import make_family_model
from tests.support.tiny import make_tiny_model
from torch import Tensor

from honed.kit.errors import DataLoss, FailedPrecondition
from honed.models.loader import load_classifier, load_language_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", 0)


def edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks weights of the model \(1, .*layers\.1\.mlp\.up_proj"),
        (lambda t: t.update({"extra.weight": torch.zeros(2)}), r"does not have \(1, the first is 'extra\.weight'"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(258, 32)}), r"lm_head\.weight"),
        (lambda t: t["model.norm.weight"].fill_(float("inf")), r"'model\.norm\.weight' holds values that are not finite"),
    ],
)
def test_a_weight_that_is_missing_unknown_misshapen_or_not_finite_is_named(
    model: Path, change: Callable[[dict[str, Tensor]], object], complaint: str
) -> None:
    edit_weights(model, change)
    with pytest.raises(DataLoss, match=complaint):
        load_language_model(model)


def test_only_the_head_may_be_new(model: Path) -> None:
    assert load_classifier(model, new_head=True).score.weight.shape == (1, 64)
    with pytest.raises(DataLoss, match=r"lacks weights of the model \(1, the first is 'score\.weight'"):
        load_classifier(model)
    edit_weights(model, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(DataLoss, match=r"model\.norm\.weight"):
        load_classifier(model, new_head=True)


def test_pickled_weights_and_code_of_the_directory_are_never_read(model: Path) -> None:
    edit_config(model, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}, model_type="evil")
    (model / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(FailedPrecondition, match="no model that can be used here"):
        load_language_model(model)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    with pytest.raises(DataLoss, match="pickled weights are not read"):
        load_language_model(model)


def test_models_that_cannot_be_trained_say_why(model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(FailedPrecondition, match="quantized weights"):
        load_language_model(model)


def test_a_model_that_caps_its_attention_attends_by_the_reference_implementation(tmp_path: Path) -> None:
    """SDPA would leave the cap out, and its log-probabilities would be another model's."""
    capped = make_family_model(tmp_path / "gemma2", "gemma2")
    loaded = load_language_model(capped)
    assert loaded.config._attn_implementation == "eager"
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(capped, dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = torch.tensor([list(range(40, 60))])
    with torch.no_grad():
        assert (loaded(ids).logits - plain(ids).logits).abs().max() > 1e-3, "if this fails, SDPA has learned it: drop the rule"
