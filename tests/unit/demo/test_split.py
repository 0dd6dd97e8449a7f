import random

import pytest
from tests.unit.demo.conftest import movies

from honed.demo.data.ratings import MOVIES, RatedText
from honed.demo.data.split import normal_form, split
from honed.kit.errors import InvalidArgument


def test_the_parts_share_no_text_and_leave_none_out():
    sets = {MOVIES: movies(50)}
    parts = split(sets, seed=1, held_out=10, judge=15)
    ids = [{rated.id for rated in part} for part in (parts.held_out, parts.judge, parts.reward)]
    assert [len(part) for part in ids] == [10, 15, 25]
    assert set.union(*ids) == {rated.id for rated in sets[MOVIES]}


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_texts():
    texts = list(movies(50))
    first = split({MOVIES: texts}, seed=1, held_out=10, judge=15)
    random.Random(3).shuffle(texts)
    assert split({MOVIES: texts}, seed=1, held_out=10, judge=15) == first
    assert split({MOVIES: texts}, seed=2, held_out=10, judge=15) != first


@pytest.mark.parametrize("seed", range(10))
def test_twins_lie_in_one_part(seed):
    twins = (RatedText(MOVIES, "a", "A pretentious mess.", (-3,)), RatedText(MOVIES, "b", "'A pretentious mess'", (-2,)))
    parts = split({MOVIES: movies(20) + twins}, seed=seed, held_out=8, judge=8)
    assert sum({"a", "b"} <= {r.id for r in part} for part in (parts.held_out, parts.judge, parts.reward)) == 1


def test_other_sets_give_texts_but_none_that_is_hidden():
    parts = split({MOVIES: movies(20)}, seed=0, held_out=5, judge=5)
    copy_of_hidden = RatedText("tweets", "1", parts.held_out[0].text.upper() + "!", (1,))
    copy_of_judge = RatedText("tweets", "2", parts.judge[0].text, (1,))
    other = RatedText("tweets", "3", "nothing like it", (1,))
    again = split({MOVIES: movies(20), "tweets": (copy_of_hidden, copy_of_judge, other)}, seed=0, held_out=5, judge=5)
    assert again.unrated == ("nothing like it",)
    hidden = {normal_form(r.text) for r in again.held_out + again.judge}
    assert not hidden & {normal_form(text) for text in again.language_texts}


def test_placeholders_of_removed_names_and_addresses_are_no_language():
    texts = ("@anonymous look http://url_removed at  this", "@anonymous @anonymous", "me@anonymous.org", "nothing to remove")
    tweets = tuple(RatedText("tweets", str(at), text, (1,)) for at, text in enumerate(texts))
    parts = split({MOVIES: movies(20), "tweets": tweets}, seed=0, held_out=5, judge=5)
    assert parts.unrated == ("look at this", "me@anonymous.org", "nothing to remove")


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InvalidArgument, match="10 different texts"):
        split({MOVIES: movies(10)}, seed=0, held_out=5, judge=5)
