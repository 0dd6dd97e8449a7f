"""The weighted sum and where the scored text ends."""

import math
from collections.abc import Sequence

import pytest
from tests.unit.reward.support import TOKENIZER, FakeScorer, item

from honed.kit.errors import InvalidArgument
from honed.reward.reward import Term, Truncation, WeightedSum
from honed.reward.scorer import ScorerFailed, ScorerInput, ScorerOutput

DOT = ord(".")


def a_length(text: str) -> float:
    return float(len(text))


def test_the_reward_is_the_weighted_sum_and_names_each_scorer_with_its_version() -> None:
    first, second = FakeScorer("first", "a"), FakeScorer("second", "b", a_length)
    [reward] = WeightedSum([Term(first, 0.5), Term(second, -2.0)]).score([item("3.0")])
    assert reward.value == 0.5 * 3.0 - 2.0 * 3
    assert [(s.scorer, s.version, s.value, s.weight) for s in reward.scores] == [
        ("first", "a", 3.0, 0.5), ("second", "b", 3.0, -2.0),
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_not_finite_is_an_error_that_names_scorer_and_sample(value: str) -> None:
    with pytest.raises(ScorerFailed, match=r"'fake' \(v1\) failed on sample 1.*not finite") as caught:
        WeightedSum([Term(FakeScorer(), 1.0)]).score([item("1"), item(value)])
    assert caught.value.sample == 1


def test_a_sum_that_overflows_is_an_error() -> None:
    with pytest.raises(ScorerFailed, match="sum overflows"):
        WeightedSum([Term(FakeScorer("a"), 1e308), Term(FakeScorer("b"), 1e308)]).score([item("1.7")])


def test_too_few_values_are_an_error() -> None:
    class Short(FakeScorer):
        def score(self, batch: Sequence[ScorerInput]) -> list[ScorerOutput]:
            return super().score(batch)[1:]

    with pytest.raises(ScorerFailed, match="1 values for 2 samples"):
        WeightedSum([Term(Short(), 1.0)]).score([item("1"), item("2")])


def test_a_bug_of_a_scorer_is_an_error_that_names_it() -> None:
    with pytest.raises(ScorerFailed, match=r"'fake'.*ValueError: told to"):
        WeightedSum([Term(FakeScorer(), 1.0)]).score([item("raise")])


def test_no_scorer_two_of_one_name_and_a_wild_weight_are_refused() -> None:
    for terms in ([], [Term(FakeScorer(), 1.0), Term(FakeScorer(), 1.0)], [Term(FakeScorer(), math.nan)]):
        with pytest.raises(InvalidArgument, match=r"reward\.scorers"):
            WeightedSum(terms)


def test_the_scored_text_ends_behind_the_first_token_at_or_after_the_position() -> None:
    seen = FakeScorer(value=a_length)
    cut = Truncation(DOT, not_before=2, missing_score=-1.0)
    rewards = WeightedSum([Term(seen, 1.0)], cut).score([item(list(b"a.b.c.")), item(list(b"ab.c")), item(list(b"abc"))])
    assert [reward.value for reward in rewards] == [4.0, 3.0, -1.0]
    assert [reward.missing for reward in rewards] == [False, False, True]
    assert seen.batches == [["a.b.", "ab.", "abc"]]
    assert rewards[2].scores[0].version == "v1", "the version is known of a response without the token too"


def test_text_is_cut_at_the_same_token_as_token_ids() -> None:
    seen = FakeScorer(value=a_length)
    WeightedSum([Term(seen, 1.0)], Truncation(DOT, 2, -1.0)).score([item("a.b.c."), item(list(b"a.b.c."))])
    assert seen.batches == [["a.b.", "a.b."]]


def test_the_truncation_token_must_be_one_token() -> None:
    assert Truncation.of_text(".", 0, -1.0, TOKENIZER).token == DOT
    with pytest.raises(InvalidArgument, match=r"truncate\.token_text: '\.\.\.' is 3 tokens"):
        Truncation.of_text("...", 0, -1.0, TOKENIZER)


def test_scorers_that_may_wait_longer_together_than_a_batch_may_are_refused_at_the_start() -> None:
    slow, slower = FakeScorer("slow"), FakeScorer("slower")
    slow.longest_s, slower.longest_s = 50.0, 60.0
    terms = [Term(slow, 1.0), Term(slower, 1.0), Term(FakeScorer("computes"), 1.0)]
    WeightedSum(terms)
    slower.longest_s = 60.5
    with pytest.raises(InvalidArgument, match=r"may take 110\.5 s \(slow 50 s, slower 60\.5 s\), where 110 s are the most"):
        WeightedSum(terms)
