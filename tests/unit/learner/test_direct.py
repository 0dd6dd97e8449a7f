"""Claims about losses that learn from preferences directly."""

from __future__ import annotations

import math

import pytest
import torch

from honed.learner import objectives
from honed.learner.objectives import direct

KINDS: list[direct.Kind] = ["sigmoid", "ipo", "hinge"]


def test_direct_losses_by_hand() -> None:
    margins = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    expected = {
        # beta m is 1, -0.5, 0
        "sigmoid": [math.log1p(math.exp(-1.0)), math.log1p(math.exp(0.5)), math.log(2.0)],
        # 1 / (2 beta) is 1
        "ipo": [1.0, 4.0, 1.0],
        "hinge": [0.0, 1.5, 1.0],
    }
    for kind in KINDS:
        assert direct.direct_preference(margins, beta=0.5, kind=kind).tolist() == pytest.approx(expected[kind]), kind


def test_conservative_dpo_by_hand() -> None:
    # 0.9 log(1 + e^-1) + 0.1 log(1 + e)
    loss = direct.direct_preference(torch.tensor([2.0], dtype=torch.float64), beta=0.5, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * 0.3132616875 + 0.1 * 1.3132616875)


@pytest.mark.parametrize("kind", KINDS)
def test_a_judgement_that_may_as_well_be_the_wrong_way_round_pulls_neither_way(kind: direct.Kind) -> None:
    margins = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    direct.direct_preference(margins, beta=0.3, kind=kind, label_smoothing=0.5).sum().backward()
    torch.testing.assert_close(margins.grad, torch.zeros_like(margins))


def test_conservative_dpo_stops_where_the_policy_is_as_sure_as_the_judgements() -> None:
    sure = 0.8
    margins = torch.tensor([math.log(sure / (1 - sure)) / 0.1], dtype=torch.float64, requires_grad=True)
    direct.direct_preference(margins, beta=0.1, label_smoothing=1 - sure).sum().backward()
    torch.testing.assert_close(margins.grad, torch.zeros_like(margins))


def test_the_gradient_of_dpo_is_beta_times_how_wrong_the_policy_is() -> None:
    margins = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    direct.direct_preference(margins, beta=0.4).sum().backward()
    torch.testing.assert_close(margins.grad, -0.4 * torch.sigmoid(-0.4 * margins.detach()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradients_of_direct_losses_are_those_of_finite_differences(kind: direct.Kind, label_smoothing: float) -> None:
    margins = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m: direct.direct_preference(m, beta=0.3, kind=kind, label_smoothing=label_smoothing), [margins]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_margins_of_any_size_have_finite_losses_and_gradients(kind: direct.Kind) -> None:
    margins = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = direct.direct_preference(margins, beta=1.0, kind=kind, label_smoothing=0.01)
    loss.sum().backward()
    assert margins.grad is not None
    assert bool(loss.isfinite().all() and margins.grad.isfinite().all())


def test_kto_by_hand() -> None:
    log_ratios, desirable = torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64), torch.tensor([True, False, True])
    loss = direct.kto(log_ratios, desirable, torch.tensor(1.0), beta=0.5, desirable_weight=1.5, undesirable_weight=2.0).tolist()
    # 1 - sigmoid(1) is 0.2689414214
    assert loss == pytest.approx([1.5 * 0.2689414214, 2.0 * 0.7310585786, 1.5 * 0.5])


def test_the_weights_of_kto_are_as_exact_as_its_log_ratios() -> None:
    loss = direct.kto(
        torch.zeros(1, dtype=torch.float64), torch.tensor([True]), torch.tensor(0.0), beta=1.0, desirable_weight=1.1
    )
    assert loss.tolist() == [0.55]


def test_kto_raises_what_is_desirable_and_lowers_what_is_not() -> None:
    log_ratios = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    direct.kto(log_ratios, torch.tensor([True, False]), torch.tensor(0.0), beta=0.4).sum().backward()
    torch.testing.assert_close(log_ratios.grad, torch.tensor([-0.1, 0.1], dtype=torch.float64))


def test_the_gradient_of_kto_is_that_of_finite_differences() -> None:
    log_ratios = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    desirable = torch.tensor([True, False, False, True, True, False])
    kl = torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r: direct.kto(r, desirable, kl, beta=0.2, undesirable_weight=1.3), [log_ratios])


def test_the_kl_that_kto_judges_against_is_never_negative_and_carries_no_gradient() -> None:
    log_ratios = torch.tensor([1.0, 2.0, -1.5], requires_grad=True)
    kl = direct.mismatched_kl(log_ratios)
    assert kl.item() == pytest.approx(0.5)
    assert not kl.requires_grad
    assert direct.mismatched_kl(-log_ratios).item() == 0.0


def test_direct_losses_are_found_among_the_objectives() -> None:
    assert objectives.direct is direct
