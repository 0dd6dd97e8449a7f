"""KTO: its gradient is that of the formula, however a batch is cut; what it judges by; what it refuses."""

import pytest
import torch
from tests.unit.learner.samples import tiny_llama

from honed.kit.errors import InvalidArgument
from honed.learner.algorithms.base import find_algorithm, make_algorithm
from honed.learner.data.labelled import Labelled, mismatched
from honed.learner.models.policy import PolicyModel, ReferenceModel
from honed.learner.settings import LearnerSettings
from honed.learner.train import rng
from honed.learner.train.on_labelled import OnLabelledUpdates
from honed.learner.train.optimizer import build_optimizer
from honed.learner.train.trainer import BadBatch, Trainer, TrainSettings

BATCH = [
    Labelled("response-0", (1, 2, 3), (4, 5, 0), True),
    Labelled("response-1", (1,), (7, 7, 7, 7, 0), False),
    Labelled("response-2", (1, 9, 9, 9, 9), (5,), True),
    Labelled("response-3", (1, 9, 9, 9, 9), (6, 2), False),
]
OPTIONS = {"beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 0.75}


def learner(**options):
    return LearnerSettings(algorithm="kto", options=options)


def trainer(*, budget=10_000, epochs=1, minibatches=1, lr=1e-2, options=None, seeds=(1, 2)):
    policy, reference = (make(tiny_llama(seed=seed)) for make, seed in zip((PolicyModel, ReferenceModel), seeds, strict=True))
    return Trainer(
        policy,
        OnLabelledUpdates(make_algorithm(learner(**(options or {}))), policy, reference),
        build_optimizer("adamw", policy.trainable().values(), lr=lr),
        settings=TrainSettings(learning_rate=lr, epochs=epochs, minibatches=minibatches, microbatch_tokens=budget),
        generator=rng.generator(5),
    )


def log_ratio(learning, prompt, response):
    found = []
    for model in (learning.model.language_model, learning.algorithm.reference.language_model):
        logprobs = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        found.append(sum(logprobs[len(prompt) - 1 + place, token] for place, token in enumerate(response)))
    return found[0] - found[1].detach()


def by_hand(learning):
    """Equations 7 and 8 of the paper on plain transformers."""
    crossed = [((1, 2, 3), (7, 7, 7, 7)), ((1,), (5,)), ((1, 9, 9, 9, 9), (4, 5)), ((1, 9, 9, 9, 9), (4, 5))]
    kl = torch.stack([log_ratio(learning, *each) for each in crossed]).mean().detach()
    total = torch.zeros(())
    for example in BATCH:
        gain = log_ratio(learning, example.prompt, example.response) - kl.clamp(min=0)
        good = example.desirable
        value = torch.sigmoid(0.3 * (gain if good else -gain))
        total = total + (1.25 if good else 0.75) * (1 - value)
    return total / len(BATCH), kl


@pytest.mark.parametrize("seeds", [(1, 2), (2, 1)])
@pytest.mark.parametrize("budget", [10_000, 12, 1])
def test_the_gradient_is_that_of_the_formula_however_a_batch_is_cut(seeds, budget):
    learning = trainer(budget=budget, options=OPTIONS, lr=0.0, seeds=seeds)
    loss, kl = by_hand(learning)
    assert (kl > 0) == (seeds == (2, 1))  # it is used as it is, or as 0
    parameters = dict(learning.model.language_model.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    figures = learning.update(BATCH)
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert figures["mismatched_log_ratio"] == pytest.approx(kl.item(), rel=1e-4, abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(parameters[name].grad, gradient, atol=1e-5, rtol=1e-4)


def test_each_prompt_gets_a_response_to_another_prompt_no_longer_than_the_longest_text():
    found = mismatched(BATCH)
    assert [each.prompt for each in found] == [each.prompt for each in BATCH]
    assert [each.response for each in found] == [(7, 7, 7, 7), (5,), (4, 5), (4, 5)]
    same = [Labelled(f"response-{n}", (1,), (n + 2,), True) for n in range(3)]
    assert [each.response for each in mismatched(same)] == [(3,), (4,), (2,)]
    assert mismatched(same[:1])[0].response == (2,)


def test_a_policy_that_is_the_reference_is_at_the_reference_point():
    figures = trainer(seeds=(1, 1)).update(BATCH)
    assert figures["loss"] == pytest.approx(0.5, abs=1e-5)
    assert figures["reward"] == pytest.approx(0.0, abs=1e-5)
    assert (figures["responses"], figures["tokens"], figures["desirable"]) == (4.0, 11.0, 0.5)


def test_it_learns_which_responses_are_good():
    learning = trainer(seeds=(1, 1), epochs=2, minibatches=2)
    figures = [learning.update(BATCH) for _ in range(12)][-1]
    assert figures["accuracy"] == 1.0
    assert figures["desirable_reward"] > 0.1 > -0.1 > figures["undesirable_reward"]


def test_responses_of_one_kind_alone_can_be_learned_and_tell_nothing_of_the_other():
    figures = trainer().update([BATCH[0], BATCH[2]])
    assert figures["desirable_reward"] == figures["reward"]
    assert "undesirable_reward" not in figures


def test_weights_that_are_no_numbers_are_refused():
    learning = trainer()
    with torch.no_grad():
        next(iter(learning.model.trainable().values())).fill_(float("nan"))
    with pytest.raises(BadBatch, match="gradient"):
        learning.update(BATCH)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"options": {"beta": 0}}, r"learner\.options\.beta"),
        ({"options": {"desirable_weight": -1}}, r"learner\.options\.desirable_weight"),
        ({"options": {"desirable_weight": 0, "undesirable_weight": 0}}, r"learner\.options\.desirable_weight: is 0"),
        ({"batch": 1}, r"learner\.batch"),
    ],
)
def test_what_cannot_be_is_refused(settings, named):
    with pytest.raises(InvalidArgument, match=named):
        make_algorithm(LearnerSettings(algorithm="kto", **settings))


def test_it_learns_from_labels():
    assert find_algorithm("kto").learns_from == "labels"
