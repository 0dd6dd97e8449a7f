"""Claims about GRPO and the options that its successors are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.unit.learner.padded import GROUP, grouped_episodes, padded_rows
from tests.unit.learner.samples import make_trainer
from tests.unit.learner.test_learning import sample
from torch import Tensor

from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.learner.data.episode import Episode
from honed.learner.objectives.kl import FixedKL
from honed.learner.train.trainer import TrainSettings


def grpo(**options: Any) -> dict[str, Any]:
    return {"algorithm": "grpo", "options": options}


def padded_loss(model: torch.nn.Module, reference: torch.nn.Module, batch: list[Episode], beta: float, o: Any) -> Tensor:
    """The loss in rows `[B, T]`, written apart from the product, as TRL's GRPOTrainer computes it, times behaviour weights.

    The policy before the update is the policy, so old log-probabilities are its own without gradient.
    """
    logp, ref, behaviour, mask = padded_rows(model, reference, batch)
    old = logp.detach()
    scores = torch.tensor([e.reward for e in batch]).view(-1, GROUP)
    advantages = scores - scores.mean(1, keepdim=True)
    if o.get("scale", "group") == "group":
        advantages = advantages / (scores.std(1, keepdim=True) + 1e-4)
    advantages = advantages.view(-1, 1)
    log_ratio = logp - old
    if o.get("ratio") == "response":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1)).unsqueeze(1).expand(mask.shape)
    ratio = log_ratio.exp()
    high = o.get("clip_high", 0.2)
    if o.get("surrogate") == "cispo":
        per_token = -ratio.clamp(max=1 + high).detach() * advantages * logp
    else:
        per_token = -torch.min(ratio * advantages, ratio.clamp(1 - 0.2, 1 + high) * advantages)
    per_token = per_token * (old - behaviour).exp().clamp(max=2.0)
    per_token = per_token + beta * ((ref - logp).exp() - (ref - logp) - 1)
    counted = mask * torch.tensor([[0.0 if e.cut and o.get("leave_out_cut") else 1.0] for e in batch])
    match o.get("reduction", "responses"):
        case "responses":
            return ((per_token * counted).sum(1) / mask.sum(1)).sum() / counted.any(1).sum()
        case "tokens":
            return (per_token * counted).sum() / counted.sum()
        case _:
            return (per_token * counted).sum() / (o["constant"] * len(batch))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": "none", "reduction": "constant", "constant": 9},  # Dr. GRPO
        {"clip_high": 0.28, "reduction": "tokens", "leave_out_cut": True},  # DAPO
        {"ratio": "response"},  # GSPO
        {"surrogate": "cispo", "reduction": "tokens", "clip_high": 4.0},
    ],
)
@pytest.mark.parametrize("budget", [40, 100_000])
def test_the_gradient_is_that_of_the_formula_in_rows(options: dict[str, Any], budget: int) -> None:
    batch = [dataclasses.replace(e, finish_reason="length" if n % 5 == 0 else "stop") for n, e in enumerate(grouped_episodes())]
    settings = TrainSettings(learning_rate=1e-3, epochs=1, microbatch_tokens=budget)
    trainer = make_trainer(settings, grpo(**options), kl=FixedKL(0.04))
    model, reference = trainer.model.language_model, trainer.algorithm.reference.language_model
    padded_loss(model, reference, batch, 0.04, options).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    trainer.update(batch)
    own = dict(model.named_parameters())
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name].grad, gradient, atol=1e-6, rtol=1e-4)


def test_the_ratio_is_clipped_against_the_policy_before_the_update_over_several_steps() -> None:
    trainer = make_trainer(TrainSettings(learning_rate=3e-3, epochs=4, minibatches=2), grpo(), kl=FixedKL(0.0))
    figures = trainer.update(grouped_episodes())
    assert figures["optimizer_steps"] == 8
    assert 0.0 < figures["clip_fraction"] < 1.0
    assert figures["ratio_max"] > 1.0


def test_prompts_whose_responses_all_have_one_score_move_nothing_and_are_counted() -> None:
    trainer = make_trainer(TrainSettings(learning_rate=1e-3), grpo(), kl=FixedKL(0.0))
    before = {name: value.clone() for name, value in trainer.model.tensors().items()}
    figures = trainer.update([dataclasses.replace(e, reward=1.0) for e in grouped_episodes()])
    assert figures["constant_groups"] == 1.0
    assert figures["grad_norm"] == 0.0
    assert all(torch.equal(before[name], value) for name, value in trainer.model.tensors().items())


def test_a_batch_of_responses_that_were_all_cut_moves_nothing() -> None:
    trainer = make_trainer(TrainSettings(), grpo(leave_out_cut=True), kl=FixedKL(0.0))
    figures = trainer.update([dataclasses.replace(e, finish_reason="length") for e in grouped_episodes()])
    assert figures["grad_norm"] == 0.0


def test_without_a_kl_price_there_is_no_reference_and_no_kl() -> None:
    trainer = make_trainer(TrainSettings(), {**grpo(), "kl": {"controller": "fixed", "coefficient": 0.0}}, kl=FixedKL(0.0))
    assert trainer.algorithm.reference is None
    assert "kl" not in trainer.update(grouped_episodes())


def test_grpo_makes_a_wanted_token_frequent() -> None:
    trainer = make_trainer(TrainSettings(learning_rate=3e-3), grpo(), kl=FixedKL(0.0))
    source = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(15):
        batch = sample(trainer, 64, source, group=8)
        seen.append(trainer.update(batch, version=VersionId(1, trainer.step))["score_mean"])
    assert sum(seen[-3:]) / 3 > sum(seen[:3]) / 3 + 0.3, seen


def test_settings_that_compare_a_response_with_itself_or_ask_for_what_is_not_there_are_refused() -> None:
    def tree(samples: int, **learner: Any) -> dict[str, Any]:
        return {"run": "r", "learner": learner, "conductor": {"samples_per_prompt": samples}}

    RunSettings.model_validate(tree(4, algorithm="grpo", batch=64))
    with pytest.raises(ValueError, match=r"conductor\.samples_per_prompt: 1, and grpo compares responses to one prompt"):
        RunSettings.model_validate(tree(1, algorithm="grpo"))
    with pytest.raises(ValueError, match=r"learner\.algorithm: there is no 'grop'; there are a2c, dpo, grpo, kto, online_dpo"):
        RunSettings.model_validate(tree(4, algorithm="grop"))
    with pytest.raises(ValueError, match=r"learner\.options\.skale: .* grpo has the options: scale, ratio, surrogate"):
        RunSettings.model_validate(tree(4, algorithm="grpo", options={"skale": "none"}))


def test_a_reduction_by_a_constant_needs_one_and_no_other_reads_it() -> None:
    def tree(**options: Any) -> dict[str, Any]:
        return {"learner": grpo(**options), "conductor": {"samples_per_prompt": 4}}

    with pytest.raises(ValueError, match=r"learner\.options\.constant: .* conductor\.response_tokens, is usual"):
        RunSettings.model_validate(tree(scale="none", reduction="constant"))
    with pytest.raises(ValueError, match=r"learner\.options\.constant: reduction tokens does not read it"):
        RunSettings.model_validate(tree(reduction="tokens", constant=24))
    RunSettings.model_validate(tree(scale="none", reduction="constant", constant=24))


def test_a_surrogate_that_is_bounded_from_above_alone_reads_one_of_the_two_bounds() -> None:
    def tree(clip_high: float | None, **learner: Any) -> dict[str, Any]:
        options = {"surrogate": "cispo", "clip_high": clip_high}
        return {"learner": {**grpo(**options), **learner}, "conductor": {"samples_per_prompt": 4}}

    with pytest.raises(ValueError, match=r"learner\.clip_ratio: surrogate cispo bounds a ratio from above alone"):
        RunSettings.model_validate(tree(4.0, clip_ratio=0.1))
    RunSettings.model_validate(tree(4.0))
    RunSettings.model_validate(tree(None, clip_ratio=0.1))
