from collections import Counter
from itertools import islice

import pytest
from tests.unit.demo.conftest import movies

from honed.demo.data.comparisons import draw_comparisons
from honed.demo.data.ratings import MOVIES, RatedText
from honed.kit.errors import InvalidArgument


def test_comparisons_repeat_with_the_seed():
    draws = [list(islice(draw_comparisons(movies(30), seed=seed, sitting=5), 200)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("sitting", [2, 5])
def test_each_side_has_one_single_rating_and_the_chosen_one_the_higher(sitting):
    for pair in islice(draw_comparisons(movies(30), seed=1, sitting=sitting), 500):
        assert pair.chosen_rating > pair.rejected_rating
        assert pair.chosen_rating in pair.chosen.ratings
        assert pair.rejected_rating in pair.rejected.ratings
        assert pair.chosen.id != pair.rejected.id


def test_people_disagree_and_the_comparisons_show_it():
    texts = (RatedText(MOVIES, "high", "h", (2, 2, 2, -1)), RatedText(MOVIES, "low", "l", (0, 0, 0, 0)))
    wins = Counter(pair.chosen.id for pair in islice(draw_comparisons(texts, seed=0), 2000))
    assert wins["high"] / 2000 == pytest.approx(0.75, abs=0.03)


def test_every_text_is_compared_equally_often():
    texts = tuple(RatedText(MOVIES, str(i), f"t{i}", (i - 5,)) for i in range(10) if i)  # no two ratings tie
    seen = Counter()
    for pair in islice(draw_comparisons(texts, seed=0, sitting=3), 3 * 3 * 20):
        seen.update((pair.chosen.id, pair.rejected.id))
    assert set(seen.values()) == {2 * 20}


@pytest.mark.parametrize(
    ("texts", "sitting", "words"),
    [
        (movies(3), 4, "cannot fill"),
        (movies(3), 1, "at least 2"),
        ((RatedText(MOVIES, "1", "a", (1,)), RatedText(MOVIES, "2", "b", (1, 1))), 2, "tie"),
    ],
)
def test_what_could_give_no_comparison_is_refused_at_once(texts, sitting, words):
    with pytest.raises(InvalidArgument, match=words):
        draw_comparisons(texts, seed=0, sitting=sitting)
