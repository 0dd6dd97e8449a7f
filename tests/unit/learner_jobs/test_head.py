"""The head alone, on a frozen body: it is the best one, and a reward model like any other."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.learner_jobs.conftest import REWARD_TRAINING, TEXTS, Killed

from honed.kit.errors import DataLoss, InvalidArgument
from honed.learner.data.judgement import Ranking, SharedTexts
from honed.learner.jobs.samples import as_scored, sample_reference
from honed.learner.supervised.features import features_of
from honed.learner.supervised.head import solve, train_head
from honed.learner.supervised.judgements import accuracy
from honed.learner.supervised.loss import SummedLoss
from honed.models.new_tokenizer import train_tokenizer
from honed.models.pooling import Pooling
from honed.models.reward_model import RewardModel
from honed.models.tokenizer import TextTokenizer, load_tokenizer
from honed.reward.model_scorer import ModelScorer
from honed.reward.scorer import ScorerInput

SEQUENCES = [[0, 5], [0, 6, 7, 8], [0, 9, 0, 4, 4], [0, 5, 5]]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model(language_model):
    return RewardModel.from_language_model(language_model, rng=rng(), pooling=Pooling("mean", (1,)))


@pytest.fixture
def rankings(tokenizer):
    encoded = [tuple(ids) for ids in TextTokenizer(tokenizer).encode_all(TEXTS)]
    return [Ranking((0,), (good, bad)) for good in encoded[:6] for bad in encoded[6:]]


def test_ratings_alone_give_ridge_regression():
    features = torch.randn(40, 5, generator=rng()) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0]) + 7.0
    features[:, 4] = 2.0  # says nothing
    values = torch.randn(40, generator=rng(1)) + 3.0
    z = ((features - features.mean(0)) / features.std(0, correction=0))[:, :4]
    best = torch.linalg.solve(2 * z.T @ z / 40 + 0.5 * torch.eye(4), 2 * z.T @ (values - values.mean()) / 40)
    expected = best / features.std(0, correction=0)[:4]
    solved = solve(features, lambda scores: (scores - values).square().mean(), ridge=0.5)
    torch.testing.assert_close(solved.weights[:4], expected, atol=1e-4, rtol=1e-3)
    assert solved.weights[4] == 0.0
    assert solved.loss == pytest.approx(float((z @ best - (values - values.mean())).square().mean()), rel=1e-4)


@pytest.mark.parametrize("objective", ["ranked_pairs", "best_of_k"])
def test_the_loss_with_its_penalty_has_no_slope_where_the_head_is(objective):
    features = torch.randn(28, 6, generator=rng())
    texts = [(n,) for n in range(28)]
    judged = [Ranking((), tuple(texts[n : n + 2]), margin=0.5, weight=2.0) for n in range(0, 12, 2)]
    judged += [Ranking((), tuple(texts[n : n + 4])) for n in range(12, 28, 4)]
    loss = SummedLoss(SharedTexts.of(judged), objective, features.device)
    deviation = features.std(0, correction=0)
    z = (features - features.mean(0)) / deviation
    solved = solve(features, lambda scores: loss(scores) / len(judged), ridge=0.1)

    def slope(weights):
        weights = weights.clone().requires_grad_()
        total = loss(z @ weights) / len(judged) + 0.05 * weights.square().sum()
        return torch.autograd.grad(total, weights)[0].abs().max()

    assert slope(torch.zeros(6)) > 0.05
    assert slope(solved.weights * deviation) < 1e-3


def test_the_head_learns_the_preference_and_the_body_stays(model, rankings, tmp_path):
    before = {name: p.detach().clone() for name, p in model.classifier.named_parameters()}
    section = REWARD_TRAINING.model_copy(update={"train": "head", "ridge": 1e-3})
    solved = train_head(model, rankings, section, tmp_path)
    assert solved.loss < 0.1
    assert accuracy(model, rankings) == 1.0
    moved = {name for name, p in model.classifier.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"score.weight"}


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_with_how_many_texts_have_them(model, rankings, tmp_path, monkeypatch, broken):
    read, texts = RewardModel.features, SharedTexts.of(rankings).texts

    def some(self, sequences):
        features = read(self, sequences).clone()
        features[[place for place, ids in enumerate(sequences) if tuple(ids) in texts[:2]], 3] = broken
        return features

    monkeypatch.setattr(RewardModel, "features", some)
    with pytest.raises(InvalidArgument, match=rf"of 2 of {len(texts)} texts .* not finite: set .*precision to float32"):
        train_head(model, rankings, REWARD_TRAINING, tmp_path)


def test_it_is_served_as_it_was_trained(model, rankings, language_model, tmp_path):
    train_head(model, rankings, REWARD_TRAINING, tmp_path / "kept")
    model.normalise(SEQUENCES)
    model.save(tmp_path / "rm", language_model)
    policy = load_tokenizer(language_model)
    scorer = ModelScorer("rm", tmp_path / "rm", policy)
    asked = [ScorerInput(policy, prompt_tokens=tuple(ids[:1]), response_tokens=tuple(ids[1:])) for ids in SEQUENCES]
    assert [output.value for output in scorer.score(asked)] == pytest.approx(model.rewards(SEQUENCES), abs=1e-5)
    again = RewardModel.from_language_model(tmp_path / "rm", rng=rng())
    again.save(tmp_path / "usual", language_model)
    assert RewardModel.load(tmp_path / "usual").pooling == Pooling(), "a body may be a reward model's; its head is another"
    wide = load_file(tmp_path / "rm" / "model.safetensors")
    save_file({**wide, "score.weight": torch.zeros(1, 7)}, tmp_path / "rm" / "model.safetensors")
    with pytest.raises(DataLoss, match=r"'score.weight' has shape \(1, 7\)"):
        RewardModel.load(tmp_path / "rm")


def test_texts_that_were_read_are_not_read_again(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("honed.learner.supervised.features._CHUNK", 2)
    texts = [[0, 5, 6, 7], [0, 5], [0, 6, 7], [0, 9], [0, 4, 4, 4, 4]]
    passes = []
    read = RewardModel.features
    monkeypatch.setattr(RewardModel, "features", lambda self, ids, **more: passes.append(ids) or read(self, ids, **more))

    def kill(done):
        if done > 0.5:
            raise Killed

    with pytest.raises(Killed):
        features_of(model, texts, tmp_path, pass_tokens=64, report=kill)
    assert len(passes) == 2
    found = features_of(model, texts, tmp_path, pass_tokens=64)
    assert len(passes) == 3
    torch.testing.assert_close(found, read(model, texts).detach())
    sorted(tmp_path.glob("*.safetensors"))[1].write_bytes(b"damaged")
    assert torch.equal(features_of(model, texts, tmp_path, pass_tokens=64), found)
    assert len(passes) == 4
    assert "damaged" in caplog.text


def test_features_for_which_there_is_no_room_are_computed_all_the_same(model, tmp_path, caplog):
    (tmp_path / "full").write_text("a file, where a directory is wanted")
    found = features_of(model, SEQUENCES, tmp_path / "full" / "features", pass_tokens=64)
    assert torch.equal(found, features_of(model, SEQUENCES, tmp_path / "other", pass_tokens=64))
    assert "not kept" in caplog.text


def test_samples_of_the_own_process_end_at_the_end_as_rollouts_do(language_model):
    prompts = [[5, 6, 7], [8, 9]] * 8
    whole = sample_reference(language_model, prompts, 12, temperature=1.0, rng=rng())
    assert {len(response) for _, response in whole} == {12}
    ends = {response[3] for _, response in whole}
    ended = sample_reference(language_model, prompts, 12, temperature=1.0, rng=rng(), ends=ends)
    assert max(len(response) for _, response in ended) <= 4
    for (_, response), (_, longer) in zip(ended, whole, strict=True):
        assert response == longer[: len(response)]
        assert response[-1] in ends
        assert not ends.intersection(response[:-1])


def test_there_must_be_judgements_and_a_body_that_says_something(model, tmp_path):
    with pytest.raises(InvalidArgument, match="none to learn from"):
        train_head(model, [], REWARD_TRAINING, tmp_path)
    with pytest.raises(InvalidArgument, match="the same of all texts"):
        solve(torch.ones(3, 2), lambda scores: scores.sum(), ridge=0.1)


def test_samples_are_tokenised_again_for_a_body_with_another_tokenizer(tokenizer):
    policy = TextTokenizer(tokenizer, digest="a")
    other = TextTokenizer(train_tokenizer(["other words entirely"], vocabulary_size=300, max_length=64), digest="b")
    prompt, response = policy.encode("A lovely", special_tokens=True), policy.encode(" film", special_tokens=False)
    samples = [(prompt, response)]
    assert as_scored(samples, policy, policy, sees_prompt=True) == [[*prompt, *response]]
    assert as_scored(samples, policy, policy, sees_prompt=False) == [[*policy.prefix, *response]]
    assert other.decode(as_scored(samples, policy, other, sees_prompt=True)[0]).strip() == "A lovely film"
    assert other.decode(as_scored(samples, policy, other, sees_prompt=False)[0]).strip() == "film"
    assert as_scored(samples, policy, other, sees_prompt=True)[0] != [*prompt, *response]
