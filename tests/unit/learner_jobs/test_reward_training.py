import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.learner_jobs.conftest import REWARD_TRAINING, TEXTS
from transformers import AutoModelForSequenceClassification

from honed.kit.errors import DataLoss, InvalidArgument
from honed.learner.supervised.language_model import ModelShape, new_language_model, save_language_model
from honed.learner.supervised.reward_model import (
    Ranking,
    Rating,
    accuracy,
    batch_judgements,
    batch_loss,
    train_reward_model,
)
from honed.models.reward_model import RewardModel
from honed.models.tokenizer import TextTokenizer

SEQUENCES = [[0, 5], [0, 6, 7, 8], [0, 9, 0, 4, 4], [0, 5, 5]]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model(language_model) -> RewardModel:
    return RewardModel.from_language_model(language_model, rng=rng())


@pytest.fixture
def rankings(tokenizer) -> list[Ranking]:
    encoded = [tuple(ids) for ids in TextTokenizer(tokenizer).encode_all(TEXTS)]
    lovely, dull = encoded[:6], encoded[6:]
    return [Ranking((0,), (good, bad)) for good in lovely for bad in dull]


def test_padding_and_the_order_of_a_batch_change_no_score(model):
    together = model.raw_scores(SEQUENCES)
    alone = torch.cat([model.raw_scores([sequence]) for sequence in SEQUENCES])
    torch.testing.assert_close(together, alone)


def test_the_score_is_read_at_the_last_token_even_when_that_is_the_end_of_text(model):
    assert model.raw_scores([[0, 5, 6]]).item() != pytest.approx(model.raw_scores([[0, 5, 6, 0]]).item())


def test_the_head_starts_as_the_recipe_says(language_model):
    heads = [
        next(p for name, p in RewardModel.from_language_model(language_model, rng=rng(s))._classifier.named_parameters()
             if name == "score.weight").detach()
        for s in range(200)
    ]  # fmt: skip
    drawn = torch.cat([head.flatten() for head in heads])
    assert drawn.std().item() == pytest.approx(1 / math.sqrt(32 + 1), rel=0.05)
    assert drawn.mean().item() == pytest.approx(0.0, abs=0.01)


def test_training_learns_the_preference_and_repeats_bit_for_bit(language_model, rankings):
    settings = replace(REWARD_TRAINING, batch_texts=4, learning_rate=5e-3)
    models = []
    for _ in range(2):
        model = RewardModel.from_language_model(language_model, rng=rng())
        reports = []
        outcome = train_reward_model(model, rankings * 3, settings, rng=rng(1), progress=reports.append)
        assert outcome.finished
        assert outcome.judgements == len(rankings) * 3
        assert reports[-1].done == 1.0
        assert accuracy(model, rankings) > 0.95
        models.append(model)
    assert models[0].rewards(SEQUENCES) == models[1].rewards(SEQUENCES)


def test_training_stops_when_its_time_is_up(model, rankings):
    ticks = itertools.count()
    settings = replace(REWARD_TRAINING, batch_texts=2, max_seconds=3.5)
    outcome = train_reward_model(model, rankings, settings, rng=rng(), clock=lambda: float(next(ticks)))
    assert not outcome.finished
    assert outcome.steps == 3


def test_no_judgements_are_an_error(model):
    with pytest.raises(InvalidArgument, match="none to learn from"):
        train_reward_model(model, [], REWARD_TRAINING, rng=rng())
    with pytest.raises(InvalidArgument):
        accuracy(model, [])


def test_a_text_passes_once_for_all_judgements_of_a_batch():
    a, b, c, d, e = (0, 1), (0, 2), (0, 3), (0, 4), (0, 5)
    judgements = [Ranking((), (a, b)), Ranking((), (c, a)), Rating((), b, 2.0), Ranking((), (d, e)), Ranking((), (d, a, b, c))]
    first, second, third = batch_judgements(judgements, texts=3)
    assert (first.sequences, first.rankings, first.ratings) == ((a, b, c), ((0, 1), (2, 0)), ((1, 2.0),))
    assert second.sequences == (d, e)
    assert third.rankings == ((0, 1, 2, 3),)  # a judgement with more texts than a batch may have goes alone
    assert sum(batch.judgements for batch in (first, second, third)) == len(judgements)


def test_the_loss_of_a_mixed_batch_weighs_each_judgement_alike():
    (batch,) = batch_judgements(
        [Ranking((0,), ((1,), (2,))), Ranking((0,), ((2,), (3,), (1,))), Rating((0,), (3,), 2.0)], texts=9
    )
    scores = torch.tensor([1.0, 0.0, 3.0])

    def worse(x):
        return math.log1p(math.exp(-x))

    pair, squared = worse(1.0), (3.0 - 2.0) ** 2
    all_pairs = (worse(-3.0) + worse(-1.0) + worse(2.0)) / 3
    best = -math.log(math.exp(0) / (math.exp(0) + math.exp(3) + math.exp(1)))
    assert batch_loss(scores, batch, "ranked_pairs").item() == pytest.approx((pair + all_pairs + squared) / 3, rel=1e-5)
    assert batch_loss(scores, batch, "best_of_k").item() == pytest.approx((pair + best + squared) / 3, rel=1e-5)


def test_gain_and_bias_make_mean_0_and_deviation_1_exactly(model):
    model.normalise(SEQUENCES)
    rewards = torch.tensor(model.rewards(SEQUENCES), dtype=torch.float64)
    assert rewards.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert rewards.std(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    model.normalise(SEQUENCES, mean=2.0, std=0.5)
    again = torch.tensor(model.rewards(SEQUENCES), dtype=torch.float64)
    torch.testing.assert_close(again, rewards * 0.5 + 2.0, rtol=1e-6, atol=1e-6)


def test_folding_the_gain_keeps_the_rewards(model):
    model.normalise(SEQUENCES)
    before = model.rewards(SEQUENCES)
    model.fold_gain()
    model.bias = model.bias
    assert model.gain == 1.0
    assert model.rewards(SEQUENCES) == pytest.approx(before, abs=1e-5)


def test_a_model_that_says_the_same_of_all_cannot_be_normalised(model):
    with pytest.raises(InvalidArgument, match="deviation"):
        model.normalise([[0, 5], [0, 5]])
    with pytest.raises(InvalidArgument, match="at least 2"):
        model.normalise([[0, 5]])


def test_a_saved_model_gives_the_same_rewards_to_honed_and_to_transformers(model, language_model, tmp_path):
    model.normalise(SEQUENCES)
    expected = model.rewards(SEQUENCES)
    model.save(tmp_path, language_model)
    assert model.rewards(SEQUENCES) == expected  # saving leaves the model as it was
    assert RewardModel.load(tmp_path).rewards(SEQUENCES) == pytest.approx(expected, abs=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, local_files_only=True)
    bias = json.loads((tmp_path / "config.json").read_text())["reward_bias"]
    with torch.no_grad():
        raw = [plain(torch.tensor([sequence])).logits.item() + bias for sequence in SEQUENCES]
    assert raw == pytest.approx(expected, abs=1e-5)
    assert plain.config.pad_token_id is None
    weights = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_what_cannot_be_read_is_refused(model, tmp_path):
    with pytest.raises(InvalidArgument, match="empty sequence"):
        model.raw_scores([[]])
    with pytest.raises(DataLoss, match=str(tmp_path)):
        RewardModel.load(tmp_path)
    with pytest.raises(InvalidArgument, match="at least two"):
        Ranking((0,), ((1,),))
    with pytest.raises(InvalidArgument, match="batch_texts"):
        replace(REWARD_TRAINING, batch_texts=1)


def test_a_body_of_fewer_layers_loads_as_such(tokenizer, tmp_path):
    shape = ModelShape(hidden_size=32, layers=3, head_size=32, max_length=64)
    save_language_model(new_language_model(shape, vocabulary_size=len(tokenizer), rng=rng()), tokenizer, tmp_path / "lm")
    model = RewardModel.from_language_model(tmp_path / "lm", rng=rng(), layers=2)
    model.save(tmp_path / "rm", tmp_path / "lm")
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["num_hidden_layers"] == 2
    assert RewardModel.load(tmp_path / "rm").rewards(SEQUENCES) == pytest.approx(model.rewards(SEQUENCES), abs=1e-6)
    with pytest.raises(InvalidArgument, match="has 3, cannot keep 4"):
        RewardModel.from_language_model(tmp_path / "lm", rng=rng(), layers=4)


def gradients(model, judgements, **settings):
    """Of one step that moves nothing."""
    seen = {}
    settings = replace(REWARD_TRAINING, learning_rate=1e-12, gradient_norm=1e9, batch_texts=64, **settings)
    step = torch.optim.AdamW.step

    def watched(self, *arguments):
        seen.update({index: parameter.grad.clone() for index, parameter in enumerate(model.parameters())})
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        outcome = train_reward_model(model, judgements, settings, rng=rng(5))
    assert outcome.steps == 1
    return seen, outcome.loss


@pytest.mark.parametrize("objective", ["ranked_pairs", "best_of_k"])
def test_the_gradient_is_that_of_the_whole_batch_however_it_is_cut(language_model, tokenizer, objective):
    ids = [tuple(row) for row in TextTokenizer(tokenizer).encode_all(TEXTS)]
    judgements = [Ranking((0,), tuple(ids[:5])), Ranking((0,), (ids[2][:3], ids[7])), Rating((0,), ids[9], 0.7)]

    def cut_at(budget):
        model = RewardModel.from_language_model(language_model, rng=rng())
        return gradients(model, judgements, objective=objective, embedding_dropout=0.0, microbatch_tokens=budget)

    whole, loss = cut_at(10_000)
    for budget in (1, 12, 40):
        cut, other = cut_at(budget)
        assert other == pytest.approx(loss, abs=1e-5)
        for index, gradient in whole.items():
            torch.testing.assert_close(cut[index], gradient, atol=1e-5, rtol=1e-4)


def test_both_readings_of_a_micro_batch_drop_the_same_components(model, rankings):
    drawn = []
    raw_scores = RewardModel.raw_scores

    def watched(self, sequences, *, dropout=0.0, rng=None):
        scores = raw_scores(self, sequences, dropout=dropout, rng=rng)
        drawn.append((tuple(map(tuple, sequences)), scores.detach().clone()))
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardModel, "raw_scores", watched)
        settings = replace(REWARD_TRAINING, batch_texts=12, microbatch_tokens=20, embedding_dropout=0.5, learning_rate=1e-12)
        train_reward_model(model, rankings[:6], settings, rng=rng(4))
    half = len(drawn) // 2
    assert half > 1
    for (first, scores), (second, again) in zip(drawn[:half], drawn[half:], strict=True):
        assert first == second
        assert torch.equal(scores, again)


def test_a_text_longer_than_the_model_reads_loses_the_prompts_beginning_and_never_the_response(model, rankings):
    assert model.max_tokens == 64
    long = tuple(range(5, 85))
    assert model.fitted((0, *long), prefix=(0,)) == ([0, *long[-63:]], 17)
    assert model.fitted(long[:64]) == (list(long[:64]), 0)
    outcome = train_reward_model(
        model, [Ranking((0, *long), ((1,), (2,))), *rankings[:2]], REWARD_TRAINING, rng=rng(), prefix=(0,)
    )
    assert outcome.finished
    assert 0 <= accuracy(model, [Ranking((0, *long), ((1,), (2,)))], (0,)) <= 1


def test_bfloat16_computes_faster_numbers_and_keeps_float32_weights(language_model, rankings):
    exact, fast = (
        RewardModel.from_language_model(language_model, rng=rng(), precision=precision) for precision in ("float32", "bfloat16")
    )
    torch.testing.assert_close(fast.raw_scores(SEQUENCES), exact.raw_scores(SEQUENCES), atol=0.1, rtol=0)
    assert not torch.equal(fast.raw_scores(SEQUENCES), exact.raw_scores(SEQUENCES))
    train_reward_model(fast, rankings * 3, replace(REWARD_TRAINING, batch_texts=4, learning_rate=5e-3), rng=rng(1))
    assert {p.dtype for p in fast.parameters()} == {torch.float32}
    assert accuracy(fast, rankings) > 0.95
