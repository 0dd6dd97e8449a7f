"""Where every admitted rollout is: arithmetic over counts."""

from __future__ import annotations

from typing import Any

from honed.conductor.accounts import Accounts, RunCounters, read_accounts
from honed.queue.admission import Cursor
from honed.queue.keys import PROMPTS, ROLLOUTS, SCORED
from honed.queue.progress import LearnerProgress
from honed.queue.stats import StageStats


def stages(**stats: dict[str, Any]) -> dict[str, StageStats]:
    return {stage: StageStats(**stats.get(stage, {})) for stage in (PROMPTS, ROLLOUTS, SCORED)}


def read(found: dict[str, StageStats], progress: LearnerProgress | None, admitted: int, skipped: int = 0) -> Accounts:
    counters = RunCounters()
    counters.observe(found)
    cursor = Cursor(position=admitted + skipped, skipped=skipped)
    accounts = read_accounts(found, progress, cursor, counters.totals, samples=2, batch=8)
    by_name = accounts.by_name()
    assert by_name.pop("admitted") == sum(by_name.values())
    return accounts


def test_each_place_is_counted_in_rollouts() -> None:
    found = stages(
        prompts={"came_in": 30, "depth": 3, "buried": 2, "replayed": 1, "dropped": {"deleted_outside": 1}},
        rollouts={"came_in": 50, "depth": 4, "buried": 1, "deleted": 1},
        scored={"came_in": 52, "depth": 16, "acked": 24, "dropped": {"stale": 5, "duplicate": 7}},
    )
    assert read(found, LearnerProgress(update=4, unsaved=8), admitted=30) == Accounts(
        admitted=60,
        trained=32,
        in_flight=3 * 2 + 4 + 16 - 8,
        dropped={"deleted_outside": 2, "stale": 5},
        dead={"prompts": 2, "rollouts": 1},
        duplicates=7,
        lost_with_redis=0,
    )


def test_between_the_learners_word_and_its_acknowledgement_nothing_counts_twice() -> None:
    before = stages(prompts={"came_in": 12}, scored={"depth": 24})
    for progress in (LearnerProgress(update=2, unsaved=16), LearnerProgress(update=2, unsaved=0)):
        accounts = read(before, progress, admitted=12)
        assert (accounts.trained, accounts.in_flight, accounts.lost_with_redis) == (16, 8, 0)
    after = stages(prompts={"came_in": 12}, scored={"depth": 8, "acked": 16})
    assert read(after, LearnerProgress(update=2), admitted=12).in_flight == 8


def test_updates_that_were_undone_are_counted_as_such() -> None:
    found = stages(prompts={"came_in": 12}, scored={"depth": 8, "acked": 16})
    accounts = read(found, LearnerProgress(update=1, undone=8), admitted=12)
    assert (accounts.trained, accounts.undone, accounts.in_flight, accounts.lost_with_redis) == (8, 8, 8, 0)


def test_turns_that_were_left_out_were_not_admitted() -> None:
    found = stages(prompts={"came_in": 4, "depth": 4})
    assert read(found, LearnerProgress(), admitted=4, skipped=9).admitted == 8


def test_what_redis_lost_is_lost_unless_the_learner_trained_on_it() -> None:
    nothing = stages()
    accounts = read(nothing, LearnerProgress(update=2), admitted=12)
    assert (accounts.trained, accounts.in_flight, accounts.lost_with_redis) == (16, 0, 8)


def test_a_second_copy_that_redis_brought_back_is_no_rollout() -> None:
    # 16 trained and acknowledged; the acknowledgements were lost, the entries came back and were dropped.
    found = stages(prompts={"came_in": 12}, scored={"depth": 8, "dropped": {"duplicate": 16}})
    accounts = read(found, LearnerProgress(update=2), admitted=12)
    assert (accounts.in_flight, accounts.lost_with_redis, accounts.duplicates, accounts.dropped) == (8, 0, 16, {})


def test_before_the_learner_says_anything_all_is_in_flight() -> None:
    assert read(stages(prompts={"came_in": 3, "depth": 3}), None, admitted=3).in_flight == 6


def test_counts_go_on_over_a_redis_that_lost_everything_and_go_back_with_one_that_lost_its_last_seconds() -> None:
    counters = RunCounters()
    full = stages(prompts={"came_in": 50}, scored={"acked": 40, "dropped": {"stale": 3}})
    assert not counters.observe(full)
    assert not counters.observe(stages(prompts={"came_in": 48}, scored={"acked": 38, "dropped": {"stale": 3}}))
    assert counters.totals["scored/acked"] == 38
    assert not counters.observe(full)
    assert counters.observe(stages())
    assert not counters.observe(stages())
    counters.observe(stages(prompts={"came_in": 5}, scored={"acked": 2}))
    assert counters.totals == {"scored/acked": 42, "scored/dropped:stale": 3}
    assert counters.observe(stages())
    assert counters.totals["scored/acked"] == 42
    assert RunCounters(counters.carried).totals == counters.totals
