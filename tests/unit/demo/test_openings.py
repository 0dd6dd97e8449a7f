import pytest

from honed.demo.data.openings import first_words
from honed.kit.errors import InvalidArgument

TEXTS = ["one two three four five six seven eight", "too short here", "just four words here", ""]


def test_a_prompt_is_the_first_words_and_never_the_whole_text():
    for seed in range(20):
        long, four = first_words(TEXTS, seed=seed, shortest=3, longest=6)
        assert TEXTS[0].startswith(long + " ")
        assert 3 <= len(long.split()) <= 6
        assert four == "just four words"


def test_prompts_repeat_with_the_seed():
    texts = TEXTS[:1] * 50
    assert first_words(texts, seed=1) == first_words(texts, seed=1) != first_words(texts, seed=2)


def test_impossible_bounds_are_refused():
    with pytest.raises(InvalidArgument, match="shortest <= longest"):
        first_words(TEXTS, seed=0, shortest=4, longest=3)
