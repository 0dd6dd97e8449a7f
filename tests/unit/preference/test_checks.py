"""The rules that the contract cannot state."""

from __future__ import annotations

import pytest
from tests.support.judgements import full

from honed.kit.errors import InvalidArgument
from honed.preference.checks import check_judgement
from honed.preference.content import KINDS
from honed.v1 import preference_pb2 as pb


@pytest.mark.parametrize("kind", KINDS)
def test_a_judgement_of_each_kind_passes(kind: str) -> None:
    check_judgement(full(kind))


@pytest.mark.parametrize(("kind", "needed"), [("pairwise", 2), ("ranking", 2), ("rating", 1), ("thumbs", 1), ("flag", 1)])
def test_each_kind_needs_what_it_judges(kind: str, needed: int) -> None:
    judgement = full(kind)
    judgement.ClearField("shown_order")
    del judgement.responses[needed - 1 :]
    with pytest.raises(InvalidArgument, match=f"needs at least {needed}, this one has {needed - 1}") as caught:
        check_judgement(judgement)
    assert caught.value.field == "judgement.responses"


def test_a_demonstration_needs_no_response() -> None:
    check_judgement(pb.Judgement(annotator="a", source="s", edit=pb.EditJudgement(text="so")))


def test_a_demonstration_cannot_be_of_a_second_response_that_is_not_there() -> None:
    with pytest.raises(InvalidArgument, match="no response 1") as caught:
        check_judgement(pb.Judgement(annotator="a", source="s", edit=pb.EditJudgement(text="so", response=1)))
    assert caught.value.field == "judgement.edit.response"


@pytest.mark.parametrize("seconds", [-62_135_596_801, 253_402_300_800])
def test_a_time_out_of_the_calendar_is_named(seconds: int) -> None:
    judgement = full()
    judgement.judged_at.seconds = seconds
    with pytest.raises(InvalidArgument) as caught:
        check_judgement(judgement)
    assert caught.value.field == "judgement.judged_at"
