"""Liveness follows the pulses of a process; readiness what its services say."""

from __future__ import annotations

import logging

import pytest
from grpc_health.v1 import health_pb2

from honed.kit.health import Health

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def live(health: Health) -> int:
    answer = await health.Check(health_pb2.HealthCheckRequest(), None)  # type: ignore[arg-type]
    return int(answer.status)


async def test_a_process_without_pulses_is_alive() -> None:
    assert await live(Health(Clock())) == SERVING


async def test_a_pulse_that_does_not_beat_within_its_limit_ends_liveness_until_it_beats(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    health = Health(clock)
    steady, update = health.pulse("intake", 1000), health.pulse("update", 60)
    clock.now += 60
    assert await live(health) == SERVING
    clock.now += 1
    with caplog.at_level(logging.ERROR):
        assert [await live(health) for _ in range(3)] == [NOT_SERVING] * 3
    (said,) = caplog.records  # once, however often it is asked
    assert said.silent_s == {"update": 61.0}  # type: ignore[attr-defined]
    update.beat()
    assert await live(health) == SERVING
    assert steady.silent_s == 61


async def test_an_idle_pulse_may_be_silent_and_is_watched_again_afterwards() -> None:
    clock = Clock()
    health = Health(clock)
    pulse = health.pulse("update", 60)
    with pulse.idle():
        clock.now += 10_000
        assert await live(health) == SERVING
    clock.now += 60
    assert await live(health) == SERVING
    clock.now += 1
    assert await live(health) == NOT_SERVING


async def test_a_pulse_that_is_idle_from_the_start_is_watched_while_it_works(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    health = Health(clock)
    pulse = health.pulse("training", 60, idle=True)
    clock.now += 10_000
    assert await live(health) == SERVING
    with pulse.working():
        clock.now += 61
        assert await live(health) == NOT_SERVING
    assert await live(health) == SERVING
    with pulse.working(), pulse.idle():
        clock.now += 61
        assert await live(health) == SERVING


async def test_readiness_does_not_depend_on_pulses() -> None:
    clock = Clock()
    health = Health(clock)
    await health.set("honed.v1.LearnerService", True)
    health.pulse("update", 1)
    clock.now += 2
    assert health.statuses == {"": NOT_SERVING, "honed.v1.LearnerService": SERVING}
