import itertools
from dataclasses import replace

import pytest
import torch
from tests.unit.learner_jobs.conftest import PRETRAINING, SHAPE, TEXTS, Killed
from transformers import AutoModelForCausalLM

from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.learner.data.continuation import Demonstration
from honed.learner.models.policy import TrainedModel
from honed.learner.sources.texts import demonstrations, packed_texts
from honed.learner.supervised.fit import Checkpoints, Fit
from honed.learner.supervised.language_model import (
    NextToken,
    language_model_rate,
    language_model_trainer,
    new_language_model,
    save_language_model,
    token_budget,
)
from honed.learner.train.algorithm import UpdateContext
from honed.models.tokenizer import TextTokenizer


def settings(**changes):
    return PRETRAINING.model_copy(update=changes)


def new_model(tokenizer, seed=3):
    rng = torch.Generator().manual_seed(seed)
    return new_language_model(SHAPE, vocabulary_size=len(tokenizer), rng=rng), rng


def fit(model, rng, source, section, **more):
    trainer = language_model_trainer(model, section, rng=rng)
    return Fit(trainer, source, token_budget(section), language_model_rate(section), **more)


def train(tokenizer, section=PRETRAINING, **more):
    model, rng = new_model(tokenizer)
    source = packed_texts(TextTokenizer(tokenizer).encode_all(TEXTS), separator=0, width=16, rows=2, seed=3)
    reports = more.pop("reports", [])
    outcome = fit(model, rng, source, section, progress=more.pop("progress", reports.append), **more).run()
    return model, outcome, reports


def after_each_step(directory):
    return Checkpoints(directory, every_s=0, clock=lambda: 0.0)  # saving takes no time by this clock, so it is always due


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_pretraining_lowers_the_loss_and_repeats_bit_for_bit(tokenizer):
    first, outcome, reports = train(tokenizer)
    again, _, _ = train(tokenizer)
    assert reports[0].loss > 5.0  # a uniform guess among 300 tokens has ln 300 = 5.7
    assert outcome.loss < reports[0].loss - 1.5
    assert same_weights(first, again)


def test_the_token_budget_ends_training_and_progress_rises_to_one(tokenizer):
    _, outcome, reports = train(tokenizer)
    assert outcome.stopped_by == "amount"
    assert outcome.amount == 2016  # the first multiple of a batch of 32 that reaches 2,000
    assert [report.step for report in reports] == list(range(1, 64))
    assert reports[-1].done == 1.0
    assert all(a.done < b.done for a, b in itertools.pairwise(reports))


def test_the_time_budget_ends_training_with_a_finished_schedule(tokenizer):
    steps = []
    section = settings(tokens=10**9, seconds=10.0, learning_rate=1e-2)
    _, outcome, _ = train(tokenizer, section, clock=lambda: float(len(steps)), progress=steps.append)
    assert (outcome.stopped_by, outcome.steps, outcome.seconds) == ("seconds", 10, 10.0)
    assert steps[-1].done >= 0.9


def test_a_training_that_is_killed_goes_on_and_ends_with_the_same_bits(tokenizer, tmp_path):
    whole, outcome, reports = train(tokenizer)

    def killed_at(step):
        def report(at):
            if at.step == step:
                raise Killed

        return report

    for step in (20, 41):  # the second is killed on its way from the first one's checkpoint
        with pytest.raises(Killed):
            train(tokenizer, progress=killed_at(step), checkpoints=after_each_step(tmp_path))
    resumed, again, later = train(tokenizer, checkpoints=after_each_step(tmp_path))
    assert (again.resumed_at, later[0].step) == (40, 41)
    assert same_weights(whole, resumed)
    assert again.loss == outcome.loss
    assert [report.loss for report in later] == [report.loss for report in reports[40:]]


def test_a_damaged_checkpoint_costs_the_time_and_not_the_job(tokenizer, tmp_path):
    def report(at):
        if at.step == 20:
            raise Killed

    with pytest.raises(Killed):
        train(tokenizer, progress=report, checkpoints=after_each_step(tmp_path))
    [kept] = tmp_path.iterdir()
    weights = kept / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    whole, _, _ = train(tokenizer)
    again, outcome, _ = train(tokenizer, checkpoints=after_each_step(tmp_path))
    assert outcome.resumed_at == 0
    assert same_weights(whole, again)


def test_time_counts_over_all_tries(tokenizer, tmp_path):
    seconds = [0.0]

    def step(at):
        seconds[0] += 1
        if at.step == 6:
            raise Killed

    section = settings(tokens=10**9, seconds=10.0)
    with pytest.raises(Killed):
        train(tokenizer, section, clock=lambda: seconds[0], progress=step, checkpoints=after_each_step(tmp_path))
    seconds[0] = 1000.0

    def on(at):
        seconds[0] += 1

    checkpoints = after_each_step(tmp_path)
    _, outcome, _ = train(tokenizer, section, clock=lambda: seconds[0], progress=on, checkpoints=checkpoints)
    assert (outcome.resumed_at, outcome.steps, outcome.seconds) == (5, 10, 10.0)


def test_a_saved_model_is_complete_and_gives_the_same_logits(tokenizer, tmp_path):
    model, _, _ = train(tokenizer)
    save_language_model(model, tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    tokens = torch.tensor([[0, 5, 6, 7]])
    assert loaded.config.pad_token_id is None
    assert next(loaded.parameters()).dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_prompt_without_loss_changes_nothing_but_through_attention(tokenizer):
    model, _ = new_model(tokenizer)
    logprobs = model(torch.tensor([[0, 5, 6, 7]])).logits.log_softmax(-1)
    by_hand = -(logprobs[0, 1, 6] + logprobs[0, 2, 7]) / 2
    prepared = NextToken(TrainedModel(model)).prepare(
        [Demonstration([0, 5], [6, 7])], UpdateContext(0, None, 100, lambda: None)
    )
    minibatch = prepared.minibatch([0])
    [micro] = minibatch.micro_batches
    total = minibatch.losses(micro)["tokens"]
    torch.testing.assert_close(total / minibatch.denominators["tokens"], by_hand)
    assert prepared.finish()["loss"] == pytest.approx(by_hand.item(), rel=1e-6)


def test_the_weights_are_the_same_however_a_batch_is_cut(tokenizer):
    weights = []
    for budget in (10_000, 20, 1):
        model, rng = new_model(tokenizer)
        items = [Demonstration([0, 5], [6, 7, 8]), Demonstration([0], [9]), Demonstration([0, 4, 4, 4], [2, 2])]
        source = demonstrations(items, rows=3, seed=0)
        fit(model, rng, source, settings(tokens=60, warmup_steps=1, microbatch_tokens=budget)).run()
        weights.append(model)
    for other in weights[1:]:
        for one, two in zip(weights[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-3)  # Adam makes steps of 1e-2 of tiny gradients too


def test_fine_tuning_teaches_the_response(tokenizer):
    model, rng = new_model(tokenizer)
    source = demonstrations([Demonstration([0, 5], [6, 7, 0]), Demonstration([0, 8], [9, 10, 0])], rows=2, seed=0)
    fit(model, rng, source, settings(tokens=1000, warmup_steps=1)).run()
    assert model(torch.tensor([[0, 5, 6, 7]])).logits[0, 1:].argmax(-1).tolist() == [6, 7, 0]
    assert model(torch.tensor([[0, 8, 9, 10]])).logits[0, 1:].argmax(-1).tolist() == [9, 10, 0]


def test_a_diverged_run_says_so(tokenizer):
    model, rng = new_model(tokenizer)
    source = demonstrations([Demonstration([1], [1, 1])], rows=1, seed=0)
    diverging = fit(model, rng, source, PRETRAINING)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FailedPrecondition, match=r"update 1: .* lower the learning rate"):
        diverging.run()


@pytest.mark.parametrize(("change", "field"), [({"head_size": 48}, "head_size"), ({"hidden_size": 100}, "hidden_size")])
def test_a_bad_shape_is_named(change, field):
    with pytest.raises(InvalidArgument, match=field):
        replace(SHAPE, **change)
