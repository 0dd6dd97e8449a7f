"""How late admission starts rollouts, in a simulated loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.conductor.simulation import Simulation, World

from honed.conductor.freshness import FreshnessController
from honed.queue.progress import LearnerProgress

UPDATES = 80


def run(world: World):
    return Simulation(world).run(UPDATES)


@pytest.mark.parametrize("samples", [1, 3, 8])
@pytest.mark.parametrize(
    "world",
    [
        World(),
        World(batch=256, slots=64, latency_s=0.8, update_s=5.5, push_s=0.4),  # the demo's times
        World(bursts=True),
        World(max_staleness=1),
        World(max_staleness=8),
        World(overlap=True, push_s=1.0, latency_s=1.0),
    ],
    ids=["fast", "demo", "bursts", "bound 1", "bound 8", "push beside the update"],
)
def test_where_generators_are_fast_rollouts_are_an_update_old_and_the_learner_does_not_wait(world: World, samples: int) -> None:
    result = run(replace(world, samples=samples, batch=world.batch // samples * samples))
    assert result.mean_staleness <= 1.2
    assert result.drop_share <= 0.01
    assert result.waiting_share <= 0.02


def test_without_the_controller_every_rollout_is_as_old_as_the_bound_allows() -> None:
    assert run(World(controlled=False)).mean_staleness == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_with_no_staleness_allowed_nothing_is_stale_and_the_loop_goes_on(samples: int) -> None:
    result = run(World(max_staleness=0, samples=samples, batch=24))
    assert (set(result.staleness), result.dropped) == ({0}, 0)


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("max_staleness", [1, 2])
def test_slow_generators_are_never_idle_and_their_rollouts_no_older_for_it(samples: int, max_staleness: int) -> None:
    result = run(World(latency_s=2.0, slots=16, samples=samples, max_staleness=max_staleness))
    assert result.idle_slots <= 0.01
    assert result.mean_staleness <= 1.2
    assert result.drop_share <= 0.01
    assert max(result.leads) == 1.0, "a lead would not make them faster"


def test_a_push_beside_the_update_that_leaves_too_little_time_is_made_up_for_by_an_earlier_start() -> None:
    world = World(overlap=True, push_s=1.5, latency_s=2.4, spread=0.1)
    result = run(world)
    assert result.waiting_share <= 0.03
    assert 1.1 < result.mean_staleness < 1.5
    assert 1.05 < sum(result.leads) / len(result.leads) < 1.6


def test_stragglers_raise_the_lead_a_little() -> None:
    result = run(World(spread=0.8))
    assert result.waiting_share <= 0.02
    assert result.mean_staleness <= 1.2
    assert max(result.leads) > 1.02


def progress(update: int, waited_s: float = 0.0, spare: int = 0, fence: int = 1) -> LearnerProgress:
    return LearnerProgress(fence=fence, update=update, waited_s=waited_s, spare=spare)


def drive(control: FreshnessController, reports: list[LearnerProgress], running: int = 0, untaken: int = 0) -> float:
    """One report each ten seconds, looked at each second."""
    now = 0.0
    for report in reports:
        for _ in range(10):
            now += 1.0
            control.observe(now, report, running, untaken)
    return control.lead


def test_the_lead_rises_only_if_the_learner_waited_while_generators_had_run_dry() -> None:
    waited = [progress(update, waited_s=1.0) for update in range(5)]
    assert drive(FreshnessController(8, 2), waited) > 1.2
    assert drive(FreshnessController(8, 2), waited, running=4) == 1.0
    assert drive(FreshnessController(8, 2), waited, running=1, untaken=1) == 1.0
    assert drive(FreshnessController(8, 2), [progress(update) for update in range(5)]) == 1.0


def test_the_lead_stays_within_its_bounds_and_comes_back() -> None:
    control = FreshnessController(8, 2)
    assert drive(control, [progress(update, waited_s=9.0) for update in range(20)]) == 2.0
    assert drive(control, [progress(update, spare=6) for update in range(20, 40)]) == 1.0
    assert FreshnessController(8, 0).lead == 0.0
    assert drive(FreshnessController(8, 0), [progress(update, waited_s=9.0) for update in range(20)]) == 0.0


def test_a_learner_that_starts_again_or_goes_back_is_measured_anew() -> None:
    control = FreshnessController(8, 4)
    drive(control, [progress(update) for update in range(9)])
    assert drive(control, [progress(9, waited_s=9, fence=2), progress(3, waited_s=9, fence=2)]) == 1.0
