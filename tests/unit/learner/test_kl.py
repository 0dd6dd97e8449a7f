"""Claims about the KL controllers."""

from __future__ import annotations

import pytest

from honed.kit.errors import InvalidArgument
from honed.learner.objectives.kl import AdaptiveKL, FixedKL, KLController, RL4LMsKL


@pytest.mark.parametrize(("kl", "expected"), [(12.0, 0.151536), (0.0, 0.148464), (6.0, 0.15)])
def test_detail_9_openai_controller_gives_its_goldens(kl: float, expected: float) -> None:
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    controller.update(kl, 512)
    assert controller.value == pytest.approx(expected, abs=1e-9)


def test_rl4lms_controller_gives_its_golden() -> None:
    controller = RL4LMsKL(0.1, target=0.1)
    controller.update(0.3, 64)
    assert controller.value == pytest.approx(0.102, abs=1e-12)


def test_a_fixed_coefficient_stays() -> None:
    controller = FixedKL(0.03)
    controller.update(100.0, 512)
    assert controller.value == 0.03


@pytest.mark.parametrize(
    "make", [lambda: AdaptiveKL(0.15, target=6.0, horizon=10_000), lambda: RL4LMsKL(0.1, target=0.1), lambda: FixedKL(0.2)]
)
def test_a_controller_goes_on_from_its_state(make: object) -> None:
    assert callable(make)
    first: KLController = make()
    first.update(9.0, 100)
    second: KLController = make()
    second.load_state(first.state())
    first.update(3.0, 100)
    second.update(3.0, 100)
    assert second.value == first.value


def test_numbers_that_cannot_work_are_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"kl\.target"):
        AdaptiveKL(0.15, target=0.0, horizon=10)
    with pytest.raises(InvalidArgument, match=r"kl\.coefficient"):
        FixedKL(-1.0)
