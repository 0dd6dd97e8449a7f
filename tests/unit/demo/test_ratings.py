import pytest
from tests.unit.demo.conftest import INNER, inner_files, packed

from honed.demo.data.ratings import MOVIES, SETS, parse_set, read_ratings
from honed.kit.errors import DataLoss


def test_the_four_sets_come_with_every_single_rating(make_archive):
    sets = read_ratings(make_archive())
    assert tuple(sets) == SETS
    first, second = sets[MOVIES]
    assert (first.id, first.text, first.ratings, first.mean_rating) == ("1", "Good fun .", (1, 2, 0), 1.0)
    assert second.text == "A dull caf\ufffd"  # bytes that are not UTF-8 do not stop the reading


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_the_data(make_archive):
    files = inner_files()
    name = f"hutto_ICWSM_2014/{MOVIES}_anonDataRatings.txt"
    files[name] = b"\xef\xbb\xbf" + files[name].replace(b"\n", b"\r\n")
    assert read_ratings(make_archive(files))[MOVIES][0].id == "1"


def test_only_a_newline_ends_a_line():
    (rated,) = parse_set("s", "1\t1.0\tone\x85two\u2028three", "1\t1.0\t0\t[1]")
    assert rated.text == "one\x85two\u2028three"


@pytest.mark.parametrize(
    ("texts", "ratings", "words"),
    [
        ("1\tone", "1\t0\t0\t[1]", "GroundTruth.txt line 1: 2 columns instead of 3"),
        ("1\t0\tone", "\n1\t0\t[1]", "anonDataRatings.txt line 2: 3 columns instead of 4"),
        ("1\t0\tone", "1\t0\t0\t[1, 5]", "line 1: rating 5"),
        ("1\t0\tone", "1\t0\t0\t[True]", "line 1: rating True"),
        ("1\t0\tone", "1\t0\t0\t[]", "not a list of integers"),
        ("1\t0\tone", "1\t0\t0\t[1, 2", "not a list of integers"),
        ("1\t0\tone", "2\t0\t0\t[1]", "no ratings for id '1'"),
        ("1\t0\tone", "1\t0\t0\t[1]\n2\t0\t0\t[1]", r"no text for the rated ids \['2'\]"),
    ],
)
def test_a_bad_line_is_named(texts, ratings, words):
    with pytest.raises(DataLoss, match=words):
        parse_set("s", texts, ratings)


def test_a_truncated_or_incomplete_archive_is_named(make_archive, tmp_path):
    whole = make_archive()
    whole.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(DataLoss, match=r"made-1\.0"):
        read_ratings(whole)
    files = inner_files()
    del files["hutto_ICWSM_2014/tweets_GroundTruth.txt"]
    with pytest.raises(DataLoss, match=r"lacks tweets_GroundTruth\.txt"):
        read_ratings(make_archive(files))
    bare = tmp_path / "bare.tar.gz"
    bare.write_bytes(packed({"a/b.txt": b""}))
    with pytest.raises(DataLoss, match="has no hutto"):
        read_ratings(bare)
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(packed({INNER: b"not a tar"}))
    with pytest.raises(DataLoss, match="cannot be read"):
        read_ratings(broken)
