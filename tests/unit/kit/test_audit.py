"""What the audit log keeps of a request: what was asked, without texts of many people and without names to be forgotten."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from honed.kit import audit
from honed.v1 import common_pb2, generation_pb2, preference_pb2, reward_pb2


@pytest.mark.parametrize(
    ("request_", "kept"),
    [
        (
            generation_pb2.CommitVersionRequest(
                version=common_pb2.PolicyVersion(run="r", fence=1, step=2), idempotency_key="k"
            ),
            {"version": {"run": "r", "fence": "1", "step": "2"}},
        ),
        (reward_pb2.LoadScorerRequest(name="rm", source="s" * 500), {"name": "rm", "source": "s" * 200 + "…"}),
        (preference_pb2.EraseAnnotatorRequest(annotator="jane", idempotency_key="jane-out"), {}),
        (
            reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(id="a", text="private"), reward_pb2.ScoreItem(id="b")]),
            {"items": "2 items"},
        ),
        (None, {}),
    ],
)
def test_a_record_says_what_was_asked(request_: Any, kept: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "honed.audit"):
        audit.record("/honed.v1.X/Y", "operator", "OK", request_)
    (line,) = caplog.records
    assert vars(line)["request"] == kept
