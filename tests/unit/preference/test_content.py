"""The canonical form: pinned by golden values, blind to who and when."""

from __future__ import annotations

import pytest
from tests.support.judgements import full, pair

from honed.preference.content import KINDS, Entry, content_sha256, to_judgement, to_row

GOLDEN = {
    "pairwise": "b6514fe7caa22be7",
    "ranking": "c6550d5729381051",
    "rating": "66fbd9367d662919",
    "thumbs": "8e97e4edd9cb8bc4",
    "edit": "9c7e67379ad9c4fd",
    "flag": "69df20a027d09098",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_canonical_form_stays_what_it_was(kind: str) -> None:
    """A library that writes protobuf in another order would change every stored hash: this notices."""
    assert content_sha256(full(kind)).hex()[:16] == GOLDEN[kind]


def test_the_order_in_which_labels_were_set_does_not_matter() -> None:
    one, other = pair(1, a="1", b="2", c="3"), pair(1, c="3", b="2", a="1")
    assert to_row(Entry("k", one)).content == to_row(Entry("k", other)).content


def test_the_hash_is_of_what_was_said_not_of_who_said_it_when() -> None:
    judgement = full()
    before = content_sha256(judgement)
    judgement.id, judgement.annotator = 7, "another"
    judgement.judged_at.seconds += 1
    assert content_sha256(judgement) == before
    judgement.labels["split"] = "test"
    assert content_sha256(judgement) != before


def test_a_row_hashes_as_its_export_does() -> None:
    for judgement in (full(), pair(1)):
        row = to_row(Entry("k", judgement))
        exported = to_judgement(5, row.annotator, 1_800_000_000_000_001, row.content)
        assert content_sha256(exported) == row.content_sha256 == content_sha256(judgement)


def test_the_pseudonym_is_not_in_the_stored_content() -> None:
    row = to_row(Entry("k", full(annotator="a-unique-name")))
    assert b"a-unique-name" not in row.content
    assert row.annotator == "a-unique-name"


def test_times_before_1970_keep_their_order() -> None:
    judgement = full()
    judgement.judged_at.FromNanoseconds(-1_500)
    assert to_row(Entry("k", judgement)).judged_at == -2
    assert to_judgement(1, "a", -2, to_row(Entry("k", pair(1))).content).judged_at.ToNanoseconds() == -2_000
