"""Algorithms that learn from pairs: their gradients are those of the formula, however a batch is cut."""

import pytest
import torch
from tests.unit.learner.samples import tiny_llama

from honed.kit.errors import InvalidArgument
from honed.learner.algorithms.base import find_algorithm, make_algorithm
from honed.learner.data.pair import Pair
from honed.learner.models.policy import PolicyModel, ReferenceModel
from honed.learner.settings import LearnerSettings
from honed.learner.train import rng
from honed.learner.train.on_pairs import OnPairUpdates
from honed.learner.train.optimizer import build_optimizer
from honed.learner.train.trainer import BadBatch, Trainer, TrainSettings

PAIRS = [
    Pair("pair-0", (1, 2, 3), (4, 5, 0), (6, 0)),
    Pair("pair-1", (1,), (7, 7, 7, 7, 0), (8, 0)),
    Pair("pair-2", (1, 9, 9, 9, 9), (5,), (3, 2, 1)),
    Pair("pair-3", (1, 4), (2, 6), (6, 2)),
]


def learner(**options):
    return LearnerSettings(algorithm="dpo", options=options)


def trainer(*, budget=10_000, epochs=1, minibatches=1, lr=1e-2, options=None, moved=True):
    policy, reference = PolicyModel(tiny_llama(seed=1)), ReferenceModel(tiny_llama(seed=2 if moved else 1))
    algorithm = make_algorithm(learner(**(options or {})))
    return Trainer(
        policy,
        OnPairUpdates(algorithm, policy, reference),
        build_optimizer("adamw", policy.trainable().values(), lr=lr),
        settings=TrainSettings(learning_rate=lr, epochs=epochs, minibatches=minibatches, microbatch_tokens=budget),
        generator=rng.generator(5),
    )


def log_probability(model, prompt, response, *, mean):
    tokens = torch.tensor([[*prompt, *response]])
    logprobs = model(input_ids=tokens).logits[0].log_softmax(-1)
    each = torch.stack([logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(response)])
    return each.mean() if mean else each.sum()


def by_hand(learning, *, beta, kind):
    """The formula of the paper, on plain transformers."""
    policy, reference = learning.model.language_model, learning.algorithm.reference.language_model
    mean, total = kind == "ipo", torch.zeros(())
    for pair in PAIRS:
        ratios = []
        for response in (pair.chosen, pair.rejected):
            with torch.no_grad():
                before = log_probability(reference, pair.prompt, response, mean=mean)
            ratios.append(log_probability(policy, pair.prompt, response, mean=mean) - before)
        margin = ratios[0] - ratios[1]
        if kind == "sigmoid":
            total = total - torch.nn.functional.logsigmoid(beta * margin)
        elif kind == "ipo":
            total = total + (margin - 1 / (2 * beta)) ** 2
        else:
            total = total + torch.relu(1 - beta * margin)
    return total / len(PAIRS)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("budget", [10_000, 24, 1])
def test_the_gradient_is_that_of_the_formula_however_a_batch_is_cut(kind, budget):
    learning = trainer(budget=budget, options={"beta": 0.3, "loss": kind}, lr=0.0)
    loss = by_hand(learning, beta=0.3, kind=kind)
    parameters = dict(learning.model.language_model.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    figures = learning.update(PAIRS)
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(parameters[name].grad, gradient, atol=1e-5, rtol=1e-4)


def test_a_policy_that_is_the_reference_has_no_margin():
    figures = trainer(moved=False).update(PAIRS)
    assert figures["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert figures["margin"] == pytest.approx(0.0, abs=1e-6)
    assert (figures["pairs"], figures["tokens"]) == (4.0, 20.0)


def test_it_learns_which_response_is_preferred():
    learning = trainer(moved=False, epochs=4, minibatches=2)
    figures = [learning.update(PAIRS) for _ in range(20)]
    assert figures[-1]["accuracy"] == 1.0
    assert figures[-1]["loss"] < 0.2
    assert figures[-1]["chosen_reward"] > figures[-1]["rejected_reward"]
    assert figures[0]["optimizer_steps"] == 8.0


def test_weights_that_are_no_numbers_are_refused():
    learning = trainer()
    with torch.no_grad():
        next(iter(learning.model.trainable().values())).fill_(float("nan"))
    with pytest.raises(BadBatch, match="gradient"):
        learning.update(PAIRS)


def test_it_says_what_it_learns_from_and_which_options_it_has():
    assert find_algorithm("dpo").learns_from == "preferences"
    assert find_algorithm("ppo").learns_from == "rollouts"
    with pytest.raises(InvalidArgument, match=r"learner\.options\.beta"):
        make_algorithm(learner(beta=0))
    with pytest.raises(InvalidArgument, match=r"label_smoothing.*dpo has the options: beta, loss, label_smoothing"):
        make_algorithm(learner(label_smoothing=0.5))
