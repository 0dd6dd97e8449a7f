"""PPO-ptx: a supervised loss beside an algorithm's, in the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.learner.padded import grouped_episodes
from tests.unit.learner.samples import make_trainer

from honed.config import RunSettings
from honed.learner.data.continuation import Demonstration
from honed.learner.sources.mixed_in import Endless, examples_of
from honed.learner.sources.texts import demonstrations
from honed.learner.supervised.language_model import NextToken
from honed.learner.train.mixture import MixedIn, Mixture
from honed.learner.train.on_policy import PolicyTrainer
from honed.learner.train.trainer import TrainSettings
from honed.models.new_tokenizer import train_tokenizer

ITEMS = [Demonstration((n % 40,), tuple((n + k) % 48 for k in range(2 + n % 5))) for n in range(37)]


def trainer(coefficient: float, share: float = 2.0, **settings: Any) -> PolicyTrainer:
    made = make_trainer(TrainSettings(**{"learning_rate": 1e-3, "epochs": 1, **settings}))
    examples = Endless(demonstrations(ITEMS, rows=1, seed=3))
    made.algorithm = Mixture(made.algorithm, NextToken(made.model), MixedIn(coefficient, share, 24, examples))
    return made


def gradients(made: PolicyTrainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in made.model.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("budget", [10_000, 24])
def test_the_gradient_is_the_algorithms_and_the_mean_cross_entropys_however_a_batch_is_cut(budget: int) -> None:
    alone = make_trainer(TrainSettings(learning_rate=0.0, epochs=1))
    alone.update(grouped_episodes())
    mixed = trainer(0.7, learning_rate=0.0, microbatch_tokens=budget)
    figures = mixed.update(grouped_episodes())

    model = alone.model.language_model
    total, count = torch.zeros(()), 0
    for item in Endless(demonstrations(ITEMS, rows=1, seed=3))(0, 48):
        logits = model(input_ids=torch.tensor([[*item.prompt, *item.response]])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(item.response), reduction="sum")
        count += len(item.response)
    before = gradients(alone)
    loss = total / count
    parameters = {f"language_model.{name}": p for name, p in model.named_parameters()}
    supervised = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    assert figures["ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert figures["ptx_tokens"] == count
    for name, gradient in gradients(mixed).items():
        expected = before[name] + (0.7 * supervised[name] if name in supervised else 0.0)
        torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-4)


def test_each_minibatch_has_the_examples_of_its_rollouts_and_an_epoch_has_all() -> None:
    figures = trainer(1.0, 0.5, minibatches=3, epochs=2).update(grouped_episodes())
    twelve = Endless(demonstrations(ITEMS, rows=1, seed=3))(0, 12)
    assert figures["ptx_tokens"] == 2 * sum(len(item.response) for item in twelve)
    assert figures["optimizer_steps"] == 6.0


def test_an_update_that_is_made_again_reads_the_same_examples_and_the_next_ones_others() -> None:
    first, second = trainer(1.0), trainer(1.0)
    for learning in (first, second):
        learning.update(grouped_episodes(seed=1))
    told = [learning.update(grouped_episodes(seed=2)) for learning in (first, second)]
    assert told[0]["ptx_loss"] == told[1]["ptx_loss"]
    resumed = trainer(1.0)
    resumed.load_state(first.state().cloned())
    for learning in (resumed, second):
        learning.update(grouped_episodes(seed=3))
    assert all(torch.equal(a, second.model.tensors()[name]) for name, a in resumed.model.tensors().items())


def test_examples_go_on_over_the_ends_of_epochs() -> None:
    examples = Endless(demonstrations(ITEMS, rows=1, seed=3))
    whole = examples(0, 3 * len(ITEMS))
    assert [sorted(whole[i : i + len(ITEMS)], key=str) for i in (0, 37, 74)] == [sorted(ITEMS, key=str)] * 3
    assert examples(30, 20) == whole[30:50]
    assert examples(0, 5) == whole[:5]


def test_what_keeps_old_texts_likely_is_the_mixture() -> None:
    mixed, alone = trainer(20.0, 2.0), trainer(1e-9, 2.0)
    losses = [(mixed.update(grouped_episodes(seed=n)), alone.update(grouped_episodes(seed=n))) for n in range(12)]
    assert losses[-1][0]["ptx_loss"] < losses[0][0]["ptx_loss"] - 0.2
    assert losses[-1][1]["ptx_loss"] > losses[-1][0]["ptx_loss"] + 0.2


def test_texts_and_demonstrations_of_the_run_file_are_read_and_what_is_missing_is_refused(tmp_path: Path) -> None:
    texts, shown = tmp_path / "texts.jsonl", tmp_path / "shown.jsonl"
    rows = [f"the number {n} comes before the number {n + 1}" for n in range(60)]
    texts.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    shown.write_text("".join(json.dumps({"text": row, "response": " yes"}) + "\n" for row in rows))
    train_tokenizer(rows, vocabulary_size=300, max_length=64).save_pretrained(tmp_path)

    def settings(block_tokens: int = 16, **data: Any) -> RunSettings:
        mix = {"data": next(iter(data)), "block_tokens": block_tokens}
        limits = {"max_prompt_tokens": 128, "max_model_tokens": 600}
        return RunSettings.model_validate({"learner": {"ptx": mix}, "data": data, "generation": limits})

    of_texts = settings(texts=[texts])
    assert of_texts.learner.ptx is not None
    blocks = examples_of(of_texts, of_texts.learner.ptx, tmp_path)(0, 50)
    assert {len(block.response) for block in blocks} == {15}
    of_shown = settings(demonstrations=[shown])
    assert of_shown.learner.ptx is not None
    assert examples_of(of_shown, of_shown.learner.ptx, tmp_path)(0, 1)[0].response[-1] == 0  # the end of a text
    texts.unlink()
    with pytest.raises(ValueError, match=r"texts\.jsonl cannot be read"):
        examples_of(of_texts, of_texts.learner.ptx, tmp_path)
    with pytest.raises(ValueError, match=r"learner\.ptx\.data: is texts, and data\.texts names none"):
        settings(texts=[])
    with pytest.raises(ValueError, match=r"learner\.ptx\.block_tokens: 900 are more"):
        RunSettings.model_validate(
            {
                "learner": {"ptx": {"block_tokens": 900}},
                "data": {"texts": ["a"]},
                "generation": {"max_prompt_tokens": 128, "max_model_tokens": 600},
            }
        )
