"""Claims about what is shown again and again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from honed.cli.live import show_live
from honed.kit.errors import Unavailable


class Over(Exception):
    """Ends the loop."""


def looks(*answers: Any) -> Any:
    left = iter(answers)

    def look() -> dict[str, Any]:
        answer = next(left, Over())
        if isinstance(answer, Exception):
            raise answer
        return {"phase": answer}

    return look


def test_who_goes_away_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Over):
        show_live(looks("one", Unavailable("gone"), "two"), str, 1.0, json=True, sleep=lambda _: None)
    first, away, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first, last) == ({"phase": "one"}, {"phase": "two"})
    assert away["error"].endswith("nobody answers, trying on: gone")


def test_the_picture_stays_with_the_reason_above_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Over):
        show_live(looks("one", Unavailable("gone")), lambda found: found["phase"], 1.0, json=False, sleep=lambda _: None)
    shown = capsys.readouterr().out
    assert shown.rindex("trying on: gone") < shown.rindex("one")


def test_who_was_never_there_is_an_error() -> None:
    with pytest.raises(Unavailable):
        show_live(looks(Unavailable("gone")), str, 1.0, json=False, sleep=lambda _: None)
