"""What people said as the policy reads it: pairs, and single responses."""

import pytest

from honed.kit.errors import InvalidArgument
from honed.learner.data.judged import Judged, encode_labelled, encode_pairs, read_labels
from honed.models.tokenizer import TextTokenizer
from honed.v1 import preference_pb2 as pb


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


def said(texts, **verdict):
    responses = [pb.JudgedResponse(text=text) for text in texts]
    return pb.Judgement(prompt="A", responses=responses, annotator="a", source="s", **verdict)


@pytest.mark.parametrize(
    ("judgement", "expected"),
    [
        (said("ab", thumbs=pb.ThumbsJudgement(response=1, up=True)), {"b": 1.0}),
        (said("ab", thumbs=pb.ThumbsJudgement(response=0, up=False)), {"a": 0.0}),
        (said("ab", flag=pb.FlagJudgement(response=1, reason="unsafe")), {"b": 0.0}),
        (said("ab", rating=pb.RatingJudgement(response=1, value=4, low=1, high=5)), {"b": 0.75}),
        (said("ab", pairwise=pb.PairwiseJudgement(preferred=1, other=0)), {"b": 1.0, "a": 0.0}),
        (said("ab", pairwise=pb.PairwiseJudgement(preferred=1, other=0, tie=True)), {}),
        (said("abcd", ranking=pb.RankingJudgement(ranks=[2, 0, 1, 2])), {"b": 1.0, "a": 0.0, "d": 0.0}),
        (said("abc", ranking=pb.RankingJudgement(ranks=[1, 1, 1])), {}),
        (said("a", edit=pb.EditJudgement(response=0, text="b")), {}),
    ],
)
def test_what_a_judgement_says_of_single_responses(judgement, expected):
    rows = read_labels(judgement)
    assert {row.responses[0]: row.rating for row in rows} == expected
    assert all(row.prompt == "A" for row in rows)


def test_ratings_above_the_threshold_are_good_and_below_it_bad(reader):
    rows = [Judged("A", (" film",), rating) for rating in (0.0, 0.6, 0.7, 1.0)]
    rows += [Judged("A", (" film " * 80,), 1.0), Judged("", ("",), 1.0)]
    found, left = encode_labelled(reader, rows, threshold=0.6, longest=64, append_end=True)
    assert [(item.rollout_id, item.desirable) for item in found] == [
        ("response-0", False),
        ("response-2", True),
        ("response-3", True),
        ("response-5", True),  # an empty one is one that ends at once
    ]
    assert found[0].response[-1] == reader.end
    assert reader.decode(found[0].prompt).strip() == "A"
    assert left == {"neither good nor bad": 1, "longer than generation.max_model_tokens": 1}
    assert encode_labelled(reader, rows[5:], threshold=0.6, longest=64, append_end=False) == ([], {"empty": 1})
