"""Low-rank adapters begin as the model was, train a small part of it, and end as its weights; in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.families import FAMILIES, make_family_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from honed.learner.models.adapters import LowRank, adapted
from honed.models.reward_model import RewardModel

TEXTS = [[5, 6, 7], [9, 8], [4, 4, 4, 11]]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reward_model(directory: Path, **options: Any) -> RewardModel:
    return RewardModel.from_language_model(directory, rng=rng(), **options)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_nothing_at_first_learn_and_become_the_weights(family: str, precision: Any, tmp_path: Path) -> None:
    model = reward_model(make_family_model(tmp_path / "base", family), precision=precision)
    classifier = model.classifier
    own = {name: value.clone() for name, value in classifier.state_dict().items()}
    kinds = [type(module) for module in classifier.modules()]
    with torch.no_grad():
        before = model.raw_scores(TEXTS)
    with adapted(classifier, classifier.score, rank=2, alpha=8.0, rng=rng(1)):
        with torch.no_grad():
            assert torch.equal(model.raw_scores(TEXTS), before)
        trained = [p for p in classifier.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) < 0.5 * sum(value.numel() for value in own.values())
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            (model.raw_scores(TEXTS) * torch.tensor([1.0, -1.0, 0.5])).sum().backward()
            optimizer.step()
        assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
        with torch.no_grad():
            learned = model.raw_scores(TEXTS)
    assert float((learned - before).abs().max()) > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(model.raw_scores(TEXTS), learned, rtol=1e-5, atol=1e-5)
    assert [type(module) for module in classifier.modules()] == kinds
    assert all(p.requires_grad for p in classifier.parameters())
    after = classifier.state_dict()
    assert after.keys() == own.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, own[name])}
    matrices = {
        f"{name}.weight" for name, module in classifier.base_model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    assert {name.removeprefix(f"{classifier.base_model_prefix}.") for name in moved} == matrices | {"score.weight"}


@pytest.mark.parametrize("transposed", [False, True])
def test_an_adapter_is_the_formula(transposed: bool) -> None:
    weight = torch.arange(6.0).view(2, 3)
    adapter = LowRank(weight.T if transposed else weight, transposed=transposed, rank=2, alpha=6.0, rng=rng())
    assert (adapter.a.shape, adapter.b.shape) == ((2, 3), (2, 2))
    assert float(adapter.a.detach().abs().max()) <= 3**-0.5
    with torch.no_grad():
        adapter.a.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]))
        adapter.b.copy_(torch.tensor([[1.0, 0.5], [0.0, -1.0]]))
    expected = weight + 3.0 * torch.tensor([[1.0, 0.5, 1.5], [0.0, -1.0, 1.0]])
    torch.testing.assert_close(adapter(weight.T if transposed else weight), expected.T if transposed else expected)


def test_what_ends_the_training_leaves_no_adapter_behind(tmp_path: Path) -> None:
    model = reward_model(make_family_model(tmp_path / "base", "gpt2"))
    names = {name for name, _ in model.classifier.named_parameters()}
    with pytest.raises(KeyError), adapted(model.classifier, model.classifier.score, rank=1, alpha=1.0, rng=rng()):
        raise KeyError
    assert {name for name, _ in model.classifier.named_parameters()} == names
