"""Claims about how the learner's parts are put together out of a run file."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from honed.artifacts.promotions import Promoted, PromotionRecord, PromotionState
from honed.config import RunSettings
from honed.learner.main import LearnerProcess, _snapshot
from honed.learner.status import LearnerStatus, Promotions
from honed.queue.promotions import Announced, PromotionBoard
from honed.reward.settings import RewardSettings, ScorerSettings


def of_run(directory: Path, *scorers: tuple[str, str]) -> RunSettings:
    given = tuple(ScorerSettings(name=name, kind="reward_model", source=source) for name, source in scorers)
    return RunSettings(run="r", directory=directory, reward=RewardSettings(scorers=given))


def promotions(settings: RunSettings) -> Promotions:
    learner = LearnerProcess(settings, MagicMock(), LearnerStatus(), asyncio.Event())
    return learner._reporter(MagicMock())._promotions


def test_a_damaged_manifest_of_a_reward_model_keeps_no_learner_from_starting(tmp_path: Path) -> None:
    settings = of_run(tmp_path, ("rm", "trained"))
    assert _snapshot(settings) == "", "none yet"
    manifest = Path(settings.policy_url, settings.run, "reward-models", "trained", "0.1", "manifest.json")
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{")
    assert _snapshot(settings) == ""


async def test_promotions_that_the_run_file_made_void_ask_for_no_new_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scorer that was removed, renamed, or given another source scores nothing: its rollouts were scored anew for ever."""
    settings = of_run(tmp_path, ("rm", "trained"), ("moved", "/models/new"))
    record = PromotionRecord(settings.policy_url, settings.run)
    promoted: Mapping[str, Promoted] = {
        "rm": Promoted("artifact:trained/0.1", "a", "trained"),
        "moved": Promoted("artifact:trained/0.1", "b", "trained"),
        "removed": Promoted("artifact:trained/0.1", "c", "trained"),
    }
    record.write(PromotionState(3, promoted))

    async def announced(self: PromotionBoard) -> Announced:
        state = record.read()
        return Announced(state.number, state.versions)

    monkeypatch.setattr(PromotionBoard, "read", announced)
    followed = promotions(settings)
    assert await followed.promoted() == {"rm": "a"}
    record.write(record.read().with_promotion("moved", Promoted("artifact:moved/0.1", "d", "/models/new")))
    assert await followed.promoted() == {"rm": "a", "moved": "d"}, "one in place of the new source stands"
