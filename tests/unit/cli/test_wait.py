"""Claims about `honed wait`, which holds a service back until there is something to start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.contract.artifacts.stores import make_source

from honed.artifacts.draft import VersionDraft
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.cli.wait import POLL_S, until_version
from honed.config import RunSettings
from honed.kit.errors import InvalidArgument


class Clock:
    """Time that passes while somebody sleeps, and what happens at certain times."""

    def __init__(self, events: dict[float, Callable[[], object]]) -> None:
        self.now, self._events = 0.0, dict(events)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for at in [at for at in self._events if at <= self.now]:
            self._events.pop(at)()


def test_it_returns_with_the_first_version_and_says_what_is_lacking_every_half_minute(tmp_path: Path) -> None:
    settings = RunSettings(run="demo", directory=tmp_path)

    def publish() -> None:
        PolicyStore(settings.policy_url, "demo").publish(make_source(tmp_path / "source"), VersionDraft(VersionId(0, 0), ()))

    said: list[str] = []
    clock = Clock({65.0: publish})
    until_version(settings, said.append, clock, clock.sleep)
    assert 65.0 <= clock.now <= 65.0 + POLL_S
    assert len(said) == 3  # at 0, 30 and 60 s
    assert "run 'demo' has no version in" in said[0]


def test_a_store_that_does_not_answer_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RunSettings(run="demo", directory=tmp_path)
    answers: list[Exception | VersionId] = [ConnectionError("no route to the store"), VersionId(0, 0)]

    def latest(_: PolicyStore) -> VersionId:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(PolicyStore, "latest", latest)
    said: list[str] = []
    clock = Clock({})
    until_version(settings, said.append, clock, clock.sleep)
    assert said == ["honed: waiting: no route to the store"]


def test_a_store_that_cannot_be_opened_is_an_error_at_once(tmp_path: Path) -> None:
    settings = RunSettings.model_validate({"run": "demo", "policy": {"url": "nonesuch://bucket/path"}})
    with pytest.raises(InvalidArgument, match="nonesuch"):
        until_version(settings, print)
