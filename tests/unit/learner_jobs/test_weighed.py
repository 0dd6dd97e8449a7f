"""What judgements say to a reward model: by how much, in the words of whom."""

import math

import pytest
from pydantic import ValidationError

from honed.learner.data.judged import Judged, encode, weighed
from honed.learner.settings import RewardTrainingSettings
from honed.models.tokenizer import TextTokenizer
from honed.v1 import preference_pb2 as pb


def said(texts="ab", *, by="ann", source="shop", **verdict):
    responses = [pb.JudgedResponse(text=text) for text in texts]
    return pb.Judgement(responses=responses, annotator=by, source=source, **verdict)


def compared(strength=0, **more):
    return said(pairwise=pb.PairwiseJudgement(preferred=1, other=0, strength=strength), **more)


def ranked(*ranks):
    return said("abcd"[: len(ranks)], ranking=pb.RankingJudgement(ranks=ranks))


def rows(*judgements, **settings):
    return list(weighed(judgements, RewardTrainingSettings(**settings)))


def test_annotators_and_sources_weigh_what_the_settings_say_and_nothing_leaves_out():
    by = {"annotator_weights": {"ann": 0.5, "eve": 0.0}, "source_weights": {"web": 3.0}}
    found = rows(
        compared(), compared(source="web"), compared(by="bob"), compared(by="eve"), compared(by="bob", source="web"), **by
    )
    assert [row.weight for row in found] == [0.5, 1.5, 1.0, 3.0]
    assert rows(compared(), annotator_weights={"ann": 0}) == []


def test_a_ranking_with_ties_orders_what_does_not_tie():
    [row] = rows(ranked(2, 0, 2, 1))
    assert (row.responses, row.ranks) == (("b", "d", "a", "c"), (0, 1, 2, 2))
    assert rows(ranked(1, 0))[0].ranks == ()
    assert rows(ranked(0, 0)) == []


def test_the_best_of_k_is_learned_where_one_is_best():
    assert rows(ranked(1, 0, 1, 1), objective="best_of_k")[0].responses[0] == "b"
    assert rows(ranked(1, 0, 0, 1), objective="best_of_k") == []


def test_scores_learn_their_difference_from_comparisons_that_say_how_much_better():
    rating = said(rating=pb.RatingJudgement(value=1, low=0, high=2))
    found = rows(compared(2), compared(), ranked(0, 1), ranked(0, 1, 2), rating, objective="scalar_compare", margin=1.5)
    assert [(row.strength, row.rating) for row in found] == [(2 / 3, None), (0.0, 0.5)]


def test_a_difference_to_learn_needs_a_margin():
    with pytest.raises(ValidationError, match="objective scalar_compare needs margin"):
        RewardTrainingSettings(objective="scalar_compare")


def test_the_margin_follows_from_how_much_better_somebody_said_it_was(tokenizer):
    said_so = rows(*(compared(strength) for strength in range(4)), ranked(0, 1))
    encoded, _ = encode(TextTokenizer(tokenizer), said_so, sees_prompt=False, margin=3.0)
    assert [row.margin for row in encoded] == [0.0, 1.0, 2.0, 3.0, 0.0]
    assert {row.margin for row in encode(TextTokenizer(tokenizer), said_so, sees_prompt=False)[0]} == {0.0}


def test_the_weights_of_a_training_have_a_mean_of_1(tokenizer):
    rating = said(by="bob", rating=pb.RatingJudgement(value=1, low=0, high=2))
    judged = rows(compared(), rating, annotator_weights={"ann": 3})
    encoded, _ = encode(TextTokenizer(tokenizer), judged, sees_prompt=False)
    assert [row.weight for row in encoded] == [1.5, 0.5]


@pytest.mark.parametrize("prefix", [(), (0,)])
def test_a_judgement_of_an_empty_response_is_left_out_where_nothing_stands_before_it(tokenizer, prefix):
    """It cannot be deleted, and ended each training from then on."""
    read = TextTokenizer(tokenizer)
    read.prefix = prefix
    empty = [Judged("a film", ("good", ""), weight=5.0), Judged("", ("",), 1.0)]
    encoded, left = encode(read, [*empty, Judged("a film", ("good", "bad"))], sees_prompt=False)
    assert (len(encoded), sum(left.values())) == ((3, 0) if prefix else (1, 2))
    assert prefix or encoded[0].weight == 1.0
    with_prompt, left = encode(read, empty[:1], sees_prompt=True)
    assert len(with_prompt) == 1


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["annotator_weights", "source_weights"])
def test_a_weight_is_a_number_that_is_not_negative(name, weight):
    with pytest.raises(ValidationError, match=name):
        RewardTrainingSettings(**{name: {"ann": weight}})
