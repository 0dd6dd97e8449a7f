"""Claims about Adam's epsilon, the schedule, and the optimizer's state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from honed.kit.errors import DataLoss, InvalidArgument
from honed.learner.train.optimizer import (
    OptimizerKind,
    build_optimizer,
    linear_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    scheduled_rate,
)

SHAPES = {"a": (3, 4), "b": (5,)}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=source)) for name, shape in SHAPES.items()}


def gradients(count: int, scale: float = 1e-4) -> list[dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(7)
    return [{name: scale * torch.randn(shape, generator=source) for name, shape in SHAPES.items()} for _ in range(count)]


def take(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], steps: list[dict[str, torch.Tensor]]) -> None:
    for step in steps:
        for name, parameter in named.items():
            parameter.grad = step[name].clone()
        optimizer.step()


def test_detail_10_adam_equals_tensorflows_formula_written_by_hand() -> None:
    named = parameters()
    start = {name: p.detach().double() for name, p in named.items()}
    steps = gradients(10)
    take(build_optimizer("adam_tf", named.values(), lr=1e-3, eps=1e-5), named, steps)
    for name, value in start.items():
        mean, square = torch.zeros_like(value), torch.zeros_like(value)
        for t, step in enumerate(steps, start=1):
            g = step[name].double()
            mean = 0.9 * mean + 0.1 * g
            square = 0.999 * square + 0.001 * g * g
            rate = 1e-3 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            value = value - rate * mean / (square.sqrt() + 1e-5)
        torch.testing.assert_close(named[name].detach().double(), value, atol=1e-6, rtol=0)


def test_detail_10_pytorchs_place_of_epsilon_takes_much_larger_first_steps() -> None:
    # Gradients of 1e-4: their root of the second moment after one step is 3e-6 raw and 1e-4 corrected, epsilon 1e-5.
    moved = {}
    for kind in ("adam_tf", "adamw"):
        named = parameters()
        before = torch.cat([p.detach().flatten() for p in named.values()])
        take(build_optimizer(kind, named.values(), lr=1e-3, eps=1e-5), named, gradients(2))
        moved[kind] = float((torch.cat([p.detach().flatten() for p in named.values()]) - before).norm())
    assert moved["adamw"] > 3 * moved["adam_tf"]


def test_with_a_vanishing_epsilon_both_places_agree() -> None:
    first, second = parameters(), parameters()
    take(build_optimizer("adam_tf", first.values(), lr=1e-3, eps=1e-12), first, gradients(5))
    take(build_optimizer("adamw", second.values(), lr=1e-3, eps=1e-12), second, gradients(5))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adam_tf", "adamw"])
def test_state_goes_through_flat_tensors_bit_for_bit(kind: OptimizerKind) -> None:
    straight = parameters()
    take(build_optimizer(kind, straight.values(), lr=1e-3), straight, gradients(6))

    first = parameters()
    before = build_optimizer(kind, first.values(), lr=1e-3)
    take(before, first, gradients(6)[:3])
    stored = {key: value.clone() for key, value in optimizer_tensors(before, first).items()}
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in first.items()}
    after = build_optimizer(kind, resumed.values(), lr=1e-3)
    load_optimizer_tensors(after, resumed, stored)
    take(after, resumed, gradients(6)[3:])
    for name in straight:
        assert torch.equal(straight[name], resumed[name])


def test_state_of_another_model_is_refused() -> None:
    named = parameters()
    optimizer = build_optimizer("adam_tf", named.values(), lr=1e-3)
    with pytest.raises(DataLoss, match="belongs to no parameter"):
        load_optimizer_tensors(optimizer, named, {"c/exp_avg": torch.zeros(1)})
    with pytest.raises(DataLoss, match="shape"):
        load_optimizer_tensors(optimizer, named, {"a/exp_avg": torch.zeros(2, 2)})


def test_the_rate_falls_linearly_to_zero() -> None:
    assert [linear_rate(8.0, step=s, total=4) for s in range(6)] == [8.0, 6.0, 4.0, 2.0, 0.0, 0.0]
    with pytest.raises(InvalidArgument, match="total"):
        linear_rate(1.0, step=0, total=0)


def test_after_a_warm_up_that_begins_at_one_step_of_it_the_rate_falls_over_the_rest() -> None:
    assert [scheduled_rate(8.0, step=s, total=8, warmup=4) for s in range(9)] == [2.0, 4.0, 6.0, 8.0, 8.0, 6.0, 4.0, 2.0, 0.0]
    assert [scheduled_rate(8.0, step=s, total=None, warmup=2) for s in range(4)] == [4.0, 8.0, 8.0, 8.0]
    assert [scheduled_rate(8.0, step=s, total=4) for s in range(5)] == [linear_rate(8.0, step=s, total=4) for s in range(5)]
    with pytest.raises(InvalidArgument, match="more than the warm-up of 4"):
        scheduled_rate(1.0, step=0, total=4, warmup=4)
