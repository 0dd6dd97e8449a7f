import itertools
from dataclasses import replace

import pytest
import torch
from tests.unit.learner_jobs.conftest import PRETRAINING, SHAPE, TEXTS
from transformers import AutoModelForCausalLM

from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.learner.data.texts import IGNORED, Demonstration, TokenBatch, demonstration_batches, packed_batches
from honed.learner.supervised.language_model import (
    language_model_loss,
    new_language_model,
    save_language_model,
    train_language_model,
)
from honed.models.tokenizer import TextTokenizer


def train(tokenizer, settings=PRETRAINING, **more):
    rng = torch.Generator().manual_seed(3)
    model = new_language_model(SHAPE, vocabulary_size=len(tokenizer), rng=rng)
    batches = packed_batches(TextTokenizer(tokenizer).encode_all(TEXTS), separator=0, width=16, rows=2, rng=rng)
    reports = []
    outcome = train_language_model(model, batches, settings, progress=reports.append, **more)
    return model, outcome, reports


def test_pretraining_lowers_the_loss_and_repeats_bit_for_bit(tokenizer):
    first, outcome, reports = train(tokenizer)
    again, _, _ = train(tokenizer)
    assert reports[0].loss > 5.0  # a uniform guess among 300 tokens has ln 300 = 5.7
    assert outcome.loss < reports[0].loss - 1.5
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_token_budget_ends_training_and_progress_rises_to_one(tokenizer):
    _, outcome, reports = train(tokenizer)
    assert outcome.stopped_by == "tokens"
    assert outcome.tokens == 2016  # the first multiple of a batch of 32 that reaches 2,000
    assert [report.step for report in reports] == list(range(1, 64))
    assert reports[-1].done == 1.0
    assert all(a.done < b.done for a, b in itertools.pairwise(reports))


def test_the_time_budget_ends_training_with_a_finished_schedule(tokenizer):
    ticks = itertools.count()
    _, outcome, reports = train(
        tokenizer, replace(PRETRAINING, tokens=10**9, max_seconds=10, learning_rate=1e-2), clock=lambda: float(next(ticks))
    )
    assert (outcome.stopped_by, outcome.steps, reports[-1].done) == ("seconds", 10, 1.0)


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
    model = new_language_model(SHAPE, vocabulary_size=len(tokenizer), rng=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 5, 6, 7]])
    masked = TokenBatch(tokens, torch.tensor([[IGNORED, IGNORED, 6, 7]]))
    logprobs = model(tokens).logits.log_softmax(-1)
    by_hand = -(logprobs[0, 1, 6] + logprobs[0, 2, 7]) / 2
    torch.testing.assert_close(language_model_loss(model, masked), by_hand)


def test_fine_tuning_teaches_the_response(tokenizer):
    model = new_language_model(SHAPE, vocabulary_size=len(tokenizer), rng=torch.Generator().manual_seed(0))
    batches = demonstration_batches(
        [Demonstration([5], [6, 7]), Demonstration([8], [9, 10])],
        separator=0, width=8, rows=2, rng=torch.Generator().manual_seed(0),
    )  # fmt: skip
    train_language_model(model, batches, replace(PRETRAINING, tokens=1000, learning_rate=1e-2, warmup_steps=1))
    assert model(torch.tensor([[0, 5, 6]])).logits[0, 1:].argmax(-1).tolist() == [6, 7]
    assert model(torch.tensor([[0, 8, 9]])).logits[0, 1:].argmax(-1).tolist() == [9, 10]


def test_a_diverged_run_says_so(tokenizer):
    model = new_language_model(SHAPE, vocabulary_size=len(tokenizer), rng=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FailedPrecondition, match="at step 1; lower the learning rate"):
        train_language_model(model, itertools.repeat(TokenBatch(torch.ones(1, 4).long(), torch.ones(1, 4).long())), PRETRAINING)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: replace(SHAPE, head_size=48), "head_size"),
        (lambda: replace(SHAPE, hidden_size=100), "hidden_size"),
        (lambda: replace(PRETRAINING, tokens=0), "tokens"),
        (lambda: replace(PRETRAINING, max_seconds=0), "max_seconds"),
        (lambda: replace(PRETRAINING, learning_rate=-1), "learning_rate"),
    ],
)
def test_a_bad_setting_is_named(make, field):
    with pytest.raises(InvalidArgument, match=field):
        make()
