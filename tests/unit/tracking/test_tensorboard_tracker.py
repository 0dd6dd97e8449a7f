"""Claims about TensorBoard's event files, read back by its own accumulator."""

from __future__ import annotations

import math
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.support.tracking import RUN, update

from honed.tracking.port import UPDATES, Mark, Outcome, Point
from honed.tracking.tensorboard_tracker import TensorboardTracker


def scalars(directory: Path, series: str, tag: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(directory / series)).Reload()
    return [(event.step, round(event.value, 4)) for event in found.Scalars(tag)]


def test_each_series_is_a_run_of_its_own(tmp_path: Path) -> None:
    tracker = TensorboardTracker(tmp_path)
    tracker.open(RUN, None, {})
    tracker.log([Point("pretrain", 40, 1_789_999_000_000, {"loss": 2.5}), update(1), update(2, ratio_max=math.inf)])
    tracker.finish(Outcome("finished", 1_790_000_009_000, 2, {"report/agreement": 0.75}))
    tracker.close()
    assert scalars(tmp_path, "online", "kl") == [(1, 0.1), (2, 0.2)]
    assert scalars(tmp_path, "online", "ratio_max") == [(2, math.inf)]
    assert scalars(tmp_path, "online", "report/agreement") == [(2, 0.75)]
    assert scalars(tmp_path, "pretrain", "loss") == [(40, 2.5)]
    text = EventAccumulator(str(tmp_path / "online")).Reload().Tensors("settings/text_summary")[0]
    assert b"learner.steps" in text.tensor_proto.string_val[0]


def test_what_was_written_twice_or_undone_counts_once(tmp_path: Path) -> None:
    killed = TensorboardTracker(tmp_path)
    killed.open(RUN, None, {})
    killed.log([Point("pretrain", 40, 1_789_999_000_000, {"loss": 2.5}), update(1), update(2), update(3)])
    after = TensorboardTracker(tmp_path)  # it was killed before it could note more than the first two
    sent = {UPDATES: Mark(update(2).at_ms, 2), "pretrain": Mark(1_789_999_000_000, 40)}
    assert after.open(RUN, "shop", sent).sent == sent
    after.log([update(3), update(4), update(2, again=60, kl=0.9), update(3, again=60)])
    after.close()
    killed.close()
    assert scalars(tmp_path, "online", "kl") == [(1, 0.1), (2, 0.9), (3, 0.3)]
    assert scalars(tmp_path, "pretrain", "loss") == [(40, 2.5)]


def test_files_of_another_run_in_the_same_directory_go(tmp_path: Path) -> None:
    for run, last in ((None, 3), (None, 1)):
        tracker = TensorboardTracker(tmp_path)
        assert tracker.open(RUN, run, {}).sent == {}
        tracker.log([update(step) for step in range(1, last + 1)])
        tracker.close()
    assert scalars(tmp_path, "online", "kl") == [(1, 0.1)]
