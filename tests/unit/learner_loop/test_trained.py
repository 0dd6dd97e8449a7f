"""Claims about the set of rollouts that have trained."""

from __future__ import annotations

import random
import time

import pytest

from honed.kit.errors import DataLoss
from honed.learner.sources import trained
from honed.learner.sources.trained import TrainedIds


def test_none_of_more_than_a_hundred_thousand_is_ever_forgotten() -> None:
    """C1: the set is exact for the whole run, and a restart reads back what was written."""
    ids = [f"r-{turn}/{sample}" for turn in range(60_000) for sample in range(4)]
    random.Random(1).shuffle(ids)
    missing = set(ids[:1000])
    found = TrainedIds("r")
    found.add(i for i in ids if i not in missing)
    again = TrainedIds.from_bytes(found.to_bytes())
    for known in (found, again):
        assert [i for i in ids if (i in known) == (i in missing)] == []
        assert (len(known), known.turn) == (len(ids) - 1000, 60_000)


def test_26_million_rollouts_take_little_room_and_little_time() -> None:
    found = TrainedIds.all_before("endless", 26_000_003)
    started = time.process_time()
    data = found.to_bytes()
    assert len(data) < 100_000
    again = TrainedIds.from_bytes(data)
    assert ["endless-26000002/0" in again, "endless-26000003/0" in again, len(again)] == [True, False, 26_000_003]
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    "other", ["s-1/0", "r-01/0", "r-1", "r-1/0/0", "r--1/0", "late-r-1/0", "", "r-999999999999/0", "r-1/99999"]
)
def test_ids_of_another_form_are_remembered_too_the_newest_of_them(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "FOREIGN", 2)
    found = TrainedIds("r")
    found.add([other])
    again = TrainedIds.from_bytes(found.to_bytes())
    assert other in again
    assert len(again) == 1
    again.add(["x1", "x2"])
    assert other not in again


def test_what_was_undone_can_train_again_and_its_turn_is_not_used_anew() -> None:
    found = TrainedIds("r")
    found.add(["r-0/0", "r-7/0", "r-8/1"])
    found.discard(["r-8/1", "r-9/0", "r-8/7", "elsewhere"])
    assert [i for i in ("r-0/0", "r-7/0", "r-8/1") if i in found] == ["r-0/0", "r-7/0"]
    assert found.turn == 9


@pytest.mark.parametrize("data", [b"", b"junk", TrainedIds("r").to_bytes()[:-3]])
def test_damage_is_data_loss(data: bytes) -> None:
    with pytest.raises(DataLoss, match="trained rollouts"):
        TrainedIds.from_bytes(data)
