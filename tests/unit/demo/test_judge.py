from itertools import islice

import pytest

from honed.demo.data.comparisons import draw_comparisons
from honed.demo.data.ratings import MOVIES, RatedText
from honed.demo.judge import RidgeJudge, agreement
from honed.kit.errors import InvalidArgument
from honed.report.measures import distinct_n

TEXTS = tuple(
    RatedText(MOVIES, f"{word}{i}", f"a {word} film number {i}", ratings)
    for i in range(20)
    for word, ratings in (("lovely", (3, 2, 4)), ("dreadful", (-3, -4, -2)))
)


def test_the_judge_learns_which_words_people_liked():
    judge = RidgeJudge.train(TEXTS)
    high, low = judge.ratings(["what a lovely story", "what a dreadful story"])
    assert high > 0 > low
    assert judge.mean_rating(["what a lovely story", "what a dreadful story"]) == pytest.approx((high + low) / 2)
    assert judge.correlation(TEXTS) > 0.9
    assert judge.ratings([]) == []


def test_the_judge_is_deterministic():
    assert RidgeJudge.train(TEXTS).ratings(["a film"]) == RidgeJudge.train(TEXTS).ratings(["a film"])


def test_agreement_counts_ties_one_half():
    pairs = list(islice(draw_comparisons(TEXTS, seed=0), 100))
    means = {(t.set, t.id): t.mean_rating for t in TEXTS}
    crossing = [pair for pair in pairs if pair.chosen_rating * pair.rejected_rating < 0]
    assert agreement(means, crossing) == 1.0
    assert agreement(dict.fromkeys(means, 0.0), pairs) == 0.5
    assert agreement({key: -value for key, value in means.items()}, crossing) == 0.0


def test_nothing_to_judge_is_an_error():
    with pytest.raises(InvalidArgument):
        RidgeJudge.train(())
    with pytest.raises(InvalidArgument):
        RidgeJudge.train(TEXTS).mean_rating([])
    with pytest.raises(InvalidArgument):
        agreement({}, [])


def test_distinct_2_by_hand():
    assert distinct_n([[1, 2, 1, 2], [1, 2]]) == pytest.approx(2 / 4)  # 12 21 12 12: two different of four
    assert distinct_n([["a"], []]) == 0.0
    assert distinct_n([[1, 1, 1, 2]], n=3) == 1.0
