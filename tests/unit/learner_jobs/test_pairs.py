import pytest

from honed.kit.errors import InvalidArgument
from honed.learner.data.judged import Judged, encode_pairs
from honed.models.tokenizer import TextTokenizer


@pytest.fixture
def reader(tokenizer):
    return TextTokenizer(tokenizer)


def encoded(reader, rows, *, longest=64, append_end=True):
    return encode_pairs(reader, rows, longest=longest, append_end=append_end)


def test_a_pair_has_its_prompt_once_and_each_response_its_end(reader):
    [pair], left = encoded(reader, [Judged("A lovely", (" quiet film", " long film"))])
    assert reader.decode(pair.prompt).strip() == "A lovely"
    assert (reader.decode(pair.chosen).strip(), reader.decode(pair.rejected).strip()) == ("quiet film", "long film")
    assert pair.chosen[-1] == pair.rejected[-1] == reader.end
    assert left == {}
    [bare], _ = encoded(reader, [Judged("A lovely", (" quiet film", " long film"))], append_end=False)
    assert (*bare.chosen, reader.end) == pair.chosen


def test_a_text_that_stands_alone_follows_the_token_that_begins_a_text(reader):
    [pair], _ = encoded(reader, [Judged("", ("A lovely film", "The dull film"))])
    assert pair.prompt == (reader.prefix or (reader.end,))


def test_what_cannot_be_compared_or_read_is_left_out_and_counted(reader):
    rows = [
        Judged("A", ("film", "film")),
        Judged("A", ("film " * 80, "it")),
        Judged("A", ("film", "it")),
        Judged("A", ("", "it")),
    ]
    pairs, left = encoded(reader, rows)
    assert [pair.rollout_id for pair in pairs] == ["pair-2", "pair-3"]  # an empty response is one that ends at once
    assert left == {"nothing to tell apart": 1, "longer than generation.max_model_tokens": 1}
    assert encoded(reader, rows[3:], append_end=False)[1] == {"nothing to tell apart": 1}


def test_a_tokenizer_without_an_end_is_told_what_to_set(reader):
    reader.end = None
    with pytest.raises(InvalidArgument, match=r"learner\.preferences\.append_end"):
        encoded(reader, [Judged("A", ("film", "it"))])
