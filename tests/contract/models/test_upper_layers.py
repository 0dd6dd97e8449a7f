"""Training the upper layers alone, with a reference that shares the lower ones, says and learns what whole models do."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.models.test_algorithms import groups, pairs
from tests.contract.models.test_families import episodes, logprobs, own
from tests.support.families import FAMILIES, make_family_model
from transformers import BloomConfig, BloomForCausalLM

from honed.artifacts.version import VersionId
from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.learner.build import updates_of
from honed.learner.data.batches import micro_batches
from honed.learner.loop.exporter import Exporter
from honed.learner.models.policy import PolicyModel, ReferenceModel
from honed.learner.models.upper_layers import UpperReference, freeze_lower_layers
from honed.learner.settings import LearnerSettings
from honed.learner.train import rng
from honed.learner.train.algorithm import UpdateContext
from honed.learner.train.optimizer import build_optimizer
from honed.learner.train.trainer import Trainer, TrainSettings
from honed.models.loader import load_language_model
from honed.models.packing import Branches

EPISODES = episodes()
WIDTH = max(len(episode.response) for episode in EPISODES)


def trainer_of(base: Path, unfrozen: int | None, **learner: Any) -> Trainer[Any, PolicyModel]:
    """One step an update; the whole model and a whole reference where `unfrozen` is None."""
    section, language_model = LearnerSettings.model_validate(learner), load_language_model(base)
    if unfrozen is not None:
        freeze_lower_layers(language_model, unfrozen)
    policy = PolicyModel(language_model)
    reference = ReferenceModel(load_language_model(base)) if unfrozen is None else UpperReference(policy, unfrozen)
    return Trainer(
        policy,
        updates_of(section, policy, reference),
        build_optimizer("adam_tf", policy.trainable().values(), lr=1e-2),
        settings=TrainSettings(learning_rate=1e-2, epochs=1, microbatch_tokens=300),
        generator=rng.generator(0),
        clock=lambda: 0.0,
    )


@pytest.mark.parametrize(("family", "unfrozen"), zip(FAMILIES, cycle((1, 2, 3))))  # of three layers
def test_the_reference_is_the_base_and_gradients_are_those_of_the_whole_model(
    family: str, unfrozen: int, tmp_path: Path
) -> None:
    base = make_family_model(tmp_path / "base", family)
    upper, whole = trainer_of(base, unfrozen), trainer_of(base, None)
    before = {name: value.clone() for name, value in upper.model.tensors().items()}
    figures, expected = upper.update(EPISODES), whole.update(EPISODES)
    assert figures["kl"] == pytest.approx(0.0, abs=1e-4)
    assert figures["policy_loss"] == pytest.approx(expected["policy_loss"], rel=1e-4)
    gradients, trained = {name: p.grad for name, p in whole.model.named_parameters()}, upper.model.trainable()
    for name, parameter in upper.model.named_parameters():
        if name in trained:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)
        else:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
    # An attention's key bias alone shifts all scores of a query alike, so its gradient may be nothing.
    still = [name for name, p in trained.items() if torch.equal(p, before[name]) and not name.endswith("k_proj.bias")]
    assert not still
    tied = upper.model.language_model.config.tie_word_embeddings
    assert ("language_model.lm_head.weight" in trained) is not tied
    assert not any("embed_tokens" in name or "wte" in name or "wpe" in name for name in trained)

    (packed,) = micro_batches(EPISODES, range(len(EPISODES)), max_tokens=10_000, width=WIDTH)
    reference, plain = upper.algorithm.reference, ReferenceModel(load_language_model(base))
    measured, beside = reference.beside(upper.model, packed)
    torch.testing.assert_close(beside, plain.logprobs(packed), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(reference.logprobs(packed), beside, atol=1e-6, rtol=0)  # pairs are read by the reference alone
    assert torch.equal(measured.logprobs, upper.model.measure(packed).logprobs)
    assert (measured.logprobs - beside).abs().max() > 1e-2, "the policy has moved"

    exported, (canary, _) = Exporter(upper.model, base, tmp_path / "export").export(VersionId(1, 1))
    assert logprobs(own(exported), canary.token_ids) == pytest.approx(list(canary.logprobs), abs=5e-5)


def test_the_reference_keeps_only_what_trains(tmp_path: Path) -> None:
    base = make_family_model(tmp_path, "llama")
    trainer = trainer_of(base, 1)
    policy, reference = trainer.model, trainer.algorithm.reference
    theirs = {parameter.data_ptr() for parameter in policy.language_model.parameters()}
    copied = [parameter.numel() for parameter in reference.parameters() if parameter.data_ptr() not in theirs]
    assert sum(copied) == sum(p.numel() for name, p in policy.trainable().items() if not name.startswith("value_head"))
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    trainer.update(EPISODES)
    assert len(trainer.optimizer.state) == len(policy.trainable())


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_groups_share_their_prompts_with_the_upper_reference_too(family: str, tmp_path: Path) -> None:
    base = make_family_model(tmp_path, family)
    upper, whole = (trainer_of(base, unfrozen, algorithm="grpo", kl={"coefficient": 0.1}) for unfrozen in (2, None))
    figures, expected = upper.update(groups()), whole.update(groups())
    assert figures["policy_loss"] == pytest.approx(expected["policy_loss"], rel=1e-4, abs=1e-6)
    gradients = {name: p.grad for name, p in whole.model.named_parameters()}
    for name, parameter in upper.model.trainable().items():
        if parameter.grad is not None:  # there is no value loss
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)
    packed = upper.algorithm.pack(groups(), range(12), UpdateContext(1, None, 10_000, lambda: None))
    assert any(isinstance(shape, Branches) for micro in packed for _, shape in micro.runs)
    plain = ReferenceModel(load_language_model(base))
    for micro in packed:
        measured, beside = upper.algorithm.reference.beside(upper.model, micro)
        torch.testing.assert_close(beside, plain.logprobs(micro), atol=1e-5, rtol=1e-4)
        assert (measured.logprobs - beside).abs().max() > 1e-2, "the policy has moved"


def test_pairs_are_compared_with_the_same_reference(tmp_path: Path) -> None:
    base = make_family_model(tmp_path, "gpt2")
    found = [trainer_of(base, unfrozen, algorithm="dpo") for unfrozen in (2, None)]
    for trainer in found:
        trainer.update(pairs())
    found[1].model.load_tensors(found[0].model.tensors())
    told = [trainer.update(pairs()) for trainer in found]
    assert told[0]["loss"] != pytest.approx(0.6931, abs=1e-2)
    for name in ("loss", "margin", "accuracy"):
        assert told[0][name] == pytest.approx(told[1][name], rel=1e-3, abs=1e-5)


def test_a_run_goes_on_from_a_version_with_fewer_digits_and_its_lower_layers_stay_the_references(tmp_path: Path) -> None:
    trainer = trainer_of(make_family_model(tmp_path, "qwen2"), 1)
    lower = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    rounded = {name: value.bfloat16().float() for name, value in trainer.model.language_model.state_dict().items()}
    trainer.restart(rounded, step=3)
    parameters = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in lower.items())
    assert torch.equal(parameters["language_model.model.norm.weight"], rounded["model.norm.weight"])


def test_more_layers_than_there_are_and_families_that_train_below_their_layers_are_refused(tmp_path: Path) -> None:
    model = load_language_model(make_family_model(tmp_path, "gemma3"))
    with pytest.raises(InvalidArgument, match=r"learner\.unfrozen_layers: the model has 3 layers, 4 of them cannot train"):
        freeze_lower_layers(model, 4)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(FailedPrecondition, match=r"BloomForCausalLM has weights below its layers .* to null"):
        freeze_lower_layers(bloom, 1)
