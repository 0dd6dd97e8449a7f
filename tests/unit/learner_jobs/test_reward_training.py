import json
import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.learner_jobs.conftest import REWARD_TRAINING, TEXTS, Killed
from transformers import AutoModelForSequenceClassification

from honed.kit.errors import DataLoss, InvalidArgument
from honed.learner.data.judgement import Ranking, Rating, SharedTexts, batch_judgements
from honed.learner.models.adapters import adapted
from honed.learner.supervised.fit import Budget, Checkpoints, Fit
from honed.learner.supervised.judgements import accuracy, judgement_batches, reward_rate, reward_trainer
from honed.learner.supervised.language_model import ModelShape, new_language_model, save_language_model
from honed.learner.supervised.loss import SummedLoss
from honed.models.reward_model import RewardModel
from honed.models.tokenizer import TextTokenizer

SEQUENCES = [[0, 5], [0, 6, 7, 8], [0, 9, 0, 4, 4], [0, 5, 5]]


def settings(**changes):
    return REWARD_TRAINING.model_copy(update=changes)


def train(model, judgements, section=REWARD_TRAINING, *, seed=1, prefix=(), **more):
    source = judgement_batches(judgements, section, seed=seed)
    trainer = reward_trainer(model, section, rng=rng(seed), prefix=prefix)
    budget = Budget(source.batches, lambda batch: 1, section.seconds)
    return Fit(trainer, source, budget, reward_rate(section), **more).run()


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
        next(p for name, p in RewardModel.from_language_model(language_model, rng=rng(s)).classifier.named_parameters()
             if name == "score.weight").detach()
        for s in range(200)
    ]  # fmt: skip
    drawn = torch.cat([head.flatten() for head in heads])
    assert drawn.std().item() == pytest.approx(1 / math.sqrt(32 + 1), rel=0.05)
    assert drawn.mean().item() == pytest.approx(0.0, abs=0.01)


def test_training_learns_the_preference_and_repeats_bit_for_bit(language_model, rankings):
    models = []
    for _ in range(2):
        model = RewardModel.from_language_model(language_model, rng=rng())
        reports = []
        outcome = train(model, rankings * 3, settings(batch_texts=4, learning_rate=5e-3), progress=reports.append)
        assert outcome.stopped_by == "amount"
        assert reports[-1].done == 1.0
        assert accuracy(model, rankings) > 0.95
        models.append(model)
    assert models[0].rewards(SEQUENCES) == models[1].rewards(SEQUENCES)


@pytest.mark.parametrize("what", ["all", "adapters"])
def test_a_training_that_is_killed_goes_on_with_the_dropout_of_then(what, language_model, rankings, tmp_path):
    section = settings(batch_texts=4, learning_rate=5e-3, microbatch_tokens=20)

    @contextmanager
    def begun():
        model = RewardModel.from_language_model(language_model, rng=rng())
        with (
            adapted(model.classifier, model.classifier.score, rank=2, alpha=4.0, rng=rng(2)) if what != "all" else nullcontext()
        ):
            yield model

    def kill(at):
        if at.step == 7:
            raise Killed

    with begun() as whole:
        train(whole, rankings, section)
    kept = {"checkpoints": Checkpoints(tmp_path, every_s=0, clock=lambda: 0.0)}
    with pytest.raises(Killed), begun() as model:
        train(model, rankings, section, progress=kill, **kept)
    with begun() as resumed:
        assert train(resumed, rankings, section, **kept).resumed_at == 6
    assert resumed.rewards(SEQUENCES) == whole.rewards(SEQUENCES)


def test_training_stops_when_its_time_is_up(model, rankings):
    steps = []
    section = settings(batch_texts=2, seconds=3.5)
    outcome = train(model, rankings, section, progress=steps.append, clock=lambda: float(len(steps)))
    assert (outcome.stopped_by, outcome.steps) == ("seconds", 4)


def test_no_judgements_are_an_error(model):
    with pytest.raises(InvalidArgument, match="none to learn from"):
        train(model, [])
    with pytest.raises(InvalidArgument):
        accuracy(model, [])


def test_a_text_passes_once_for_all_judgements_of_a_batch():
    a, b, c, d, e = (0, 1), (0, 2), (0, 3), (0, 4), (0, 5)
    judgements = [Ranking((), (a, b)), Ranking((), (c, a)), Rating((), b, 2.0), Ranking((), (d, e)), Ranking((), (d, a, b, c))]
    batches = batch_judgements(judgements, texts=3)
    assert [judgement for batch in batches for judgement in batch] == judgements
    first, second, third = map(SharedTexts.of, batches)
    assert first.texts == (a, b, c)
    assert (first.rankings, first.ratings) == ((((0, 1), judgements[0]), ((2, 0), judgements[1])), ((1, judgements[2]),))
    assert second.texts == (d, e)
    assert [places for places, _ in third.rankings] == [
        (0, 1, 2, 3)
    ]  # a judgement with more texts than a batch may have goes alone


def summed_loss(scores, shared, objective):
    return SummedLoss(shared, objective, scores.device)(scores)


def test_the_loss_of_a_mixed_batch_weighs_each_judgement_alike():
    shared = SharedTexts.of([Ranking((0,), ((1,), (2,))), Ranking((0,), ((2,), (3,), (1,))), Rating((0,), (3,), 2.0)])
    scores = torch.tensor([1.0, 0.0, 3.0])

    def worse(x):
        return math.log1p(math.exp(-x))

    pair, squared = worse(1.0), (3.0 - 2.0) ** 2
    all_pairs = (worse(-3.0) + worse(-1.0) + worse(2.0)) / 3
    best = -math.log(math.exp(0) / (math.exp(0) + math.exp(3) + math.exp(1)))
    assert summed_loss(scores, shared, "ranked_pairs").item() == pytest.approx(pair + all_pairs + squared, rel=1e-5)
    assert summed_loss(scores, shared, "best_of_k").item() == pytest.approx(pair + best + squared, rel=1e-5)


def test_margins_ties_and_weights_reach_the_loss():
    def worse(x):
        return math.log1p(math.exp(-x))

    scores = torch.tensor([1.0, 0.0, 3.0])
    first, second, third = (1,), (2,), (3,)
    shared = SharedTexts.of([
        Ranking((0,), (first, second), margin=0.5, weight=2.0),
        Ranking((0,), (first, second, third), ranks=(0, 1, 1), weight=0.25),
        Rating((0,), third, 2.0, weight=0.75),
    ])  # fmt: skip
    pair, squared = 2.0 * worse(1.0 - 0.5), 0.75 * (3.0 - 2.0) ** 2
    all_pairs = 0.25 * (worse(1.0) + worse(-2.0)) / 2
    best = -0.25 * math.log(math.exp(1) / (math.exp(0) + math.exp(3) + math.exp(1)))
    assert summed_loss(scores, shared, "ranked_pairs").item() == pytest.approx(pair + all_pairs + squared, rel=1e-5)
    assert summed_loss(scores, shared, "best_of_k").item() == pytest.approx(pair + best + squared, rel=1e-5)


def test_the_difference_of_scores_is_held_against_the_margin():
    shared = SharedTexts.of([
        Ranking((0,), ((1,), (2,)), margin=0.5, weight=2.0),
        Ranking((0,), ((3,), (1,)), margin=3.0),
        Rating((0,), (3,), 2.0, weight=0.75),
    ])  # fmt: skip
    expected = 2.0 * (1.0 - 0.5) ** 2 + (2.0 - 3.0) ** 2 + 0.75 * (3.0 - 2.0) ** 2
    assert summed_loss(torch.tensor([1.0, 0.0, 3.0]), shared, "scalar_compare").item() == pytest.approx(expected)


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


def test_a_body_of_fewer_layers_loads_as_such(tokenizer, tmp_path):
    shape = ModelShape(hidden_size=32, layers=3, head_size=32, max_length=64)
    save_language_model(new_language_model(shape, vocabulary_size=len(tokenizer), rng=rng()), tokenizer, tmp_path / "lm")
    model = RewardModel.from_language_model(tmp_path / "lm", rng=rng(), layers=2)
    model.save(tmp_path / "rm", tmp_path / "lm")
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["num_hidden_layers"] == 2
    assert RewardModel.load(tmp_path / "rm").rewards(SEQUENCES) == pytest.approx(model.rewards(SEQUENCES), abs=1e-6)
    with pytest.raises(InvalidArgument, match="has 3, cannot keep 4"):
        RewardModel.from_language_model(tmp_path / "lm", rng=rng(), layers=4)


def gradients(model, judgements, **changes):
    """Of one step that moves nothing."""
    seen = {}
    section = settings(learning_rate=1e-12, gradient_norm=1e9, batch_texts=64, **changes)
    step = torch.optim.AdamW.step

    def watched(self, *arguments):
        seen.update({name: parameter.grad.clone() for name, parameter in model.classifier.named_parameters()})
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        outcome = train(model, judgements, section, seed=5)
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
        section = settings(batch_texts=12, microbatch_tokens=20, embedding_dropout=0.5, learning_rate=1e-12)
        train(model, rankings[:6], section)
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
    outcome = train(model, [Ranking((0, *long), ((1,), (2,))), *rankings[:2]], prefix=(0,))
    assert outcome.stopped_by == "amount"
    assert 0 <= accuracy(model, [Ranking((0, *long), ((1,), (2,)))], (0,)) <= 1


def test_bfloat16_computes_faster_numbers_and_keeps_float32_weights(language_model, rankings):
    exact, fast = (
        RewardModel.from_language_model(language_model, rng=rng(), precision=precision) for precision in ("float32", "bfloat16")
    )
    torch.testing.assert_close(fast.raw_scores(SEQUENCES), exact.raw_scores(SEQUENCES), atol=0.1, rtol=0)
    assert not torch.equal(fast.raw_scores(SEQUENCES), exact.raw_scores(SEQUENCES))
    train(fast, rankings * 3, settings(batch_texts=4, learning_rate=5e-3))
    assert {p.dtype for p in fast.classifier.parameters()} == {torch.float32}
    assert accuracy(fast, rankings) > 0.95
