"""The weighted sum and where the scored text ends."""

import math
from collections.abc import Sequence

import pytest
from tests.unit.reward.support import TOKENIZER, FakeScorer, item

from honed.kit.errors import InvalidArgument
from honed.reward.messages import score_messages
from honed.reward.reward import Term, Truncation, WeightedSum
from honed.reward.scorer import NotAScore, ScorerFailed, ScorerInput, ScorerOutput

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
    with pytest.raises(NotAScore, match=r"'fake' \(v1\) failed on sample 1.*not finite") as caught:
        WeightedSum([Term(FakeScorer(), 1.0)]).score([item("1"), item(value)])
    assert caught.value.sample == 1


def test_a_sum_that_overflows_is_an_error() -> None:
    with pytest.raises(NotAScore, match="sum overflows"):
        WeightedSum([Term(FakeScorer("a"), 1e308), Term(FakeScorer("b"), 1e308)]).score([item("1.7")])


def test_too_few_values_are_an_error() -> None:
    class Short(FakeScorer):
        def score(self, batch: Sequence[ScorerInput]) -> list[ScorerOutput]:
            return super().score(batch)[1:]

    with pytest.raises(NotAScore, match="1 values for 2 samples"):
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


class Dense(FakeScorer):
    """Rewards each token with `each`, unless `given` says otherwise."""

    def __init__(self, each: float = 1.0, given: tuple[float, ...] | None = None) -> None:
        super().__init__("dense")
        self.each, self.given = each, given

    def score(self, batch: Sequence[ScorerInput]) -> list[ScorerOutput]:
        rows = [self.given if self.given is not None else (self.each,) * len(sample.response_ids) for sample in batch]
        return [ScorerOutput(sum(row), token_values=row) for row in rows]


def test_rewards_of_tokens_reach_the_message_and_their_sum_the_reward() -> None:
    [reward] = WeightedSum([Term(Dense(0.5), 2.0), Term(FakeScorer("flat"), 1.0)]).score([item(list(b"12"))])
    assert reward.value == 2.0 * 1.0 + 12.0
    dense, flat = score_messages(reward)
    assert (list(dense.token_values), list(flat.token_values)) == ([0.5, 0.5], [])


def test_behind_the_truncation_token_a_token_is_worth_nothing() -> None:
    scorer = WeightedSum([Term(Dense(), 1.0)], Truncation(ord("."), 0, -1.0))
    cut, missing = scorer.score([item(list(b"ab.cd")), item(list(b"abcd"))])
    assert (cut.value, cut.scores[0].token_values) == (3.0, (1.0, 1.0, 1.0, 0.0, 0.0))
    assert (missing.value, missing.missing) == (-1.0, True)


@pytest.mark.parametrize(
    ("given", "sample", "reason"),
    [
        ((1.0,) * 3, 1, "returned 3 rewards for a response of 2 tokens"),
        ((), 1, "returned 0 rewards for a response of 2 tokens"),
        ((1.0, 1e39), 0, r"reward of token 1 is 1e\+39, which is not finite in float32"),
    ],
)
def test_rewards_of_tokens_that_are_not_one_a_token_name_the_scorer_and_the_sample(
    given: tuple[float, ...], sample: int, reason: str
) -> None:
    with pytest.raises(NotAScore, match=f"scorer 'dense' .*on sample {sample}: .*{reason}") as caught:
        WeightedSum([Term(Dense(given=given), 1.0)]).score([item(list(b"x") * len(given)), item(list(b"ab"))])
    assert caught.value.sample == sample
