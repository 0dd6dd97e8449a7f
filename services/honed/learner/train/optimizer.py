"""Adam as TensorFlow computes it, AdamW as PyTorch does, one linear schedule, and their state as flat tensors.

Where epsilon stands decides how bold the first steps are. PyTorch adds it to the bias-corrected root, TensorFlow to the raw
one: while the second moment is young, TensorFlow's steps are smaller by far for parameters with small gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, overload

import torch
from torch import Tensor, nn

from honed.kit.errors import DataLoss, InvalidArgument

OptimizerKind = Literal["adam_tf", "adamw"]
EPSILON: Final = 1e-5
"""Of either kind where nobody says: lm-human-preferences'. torch's own AdamW has 1e-8; recorded results were made with this."""


class TensorFlowAdam(torch.optim.Optimizer):
    """Adam with epsilon in TensorFlow's place.

    `lr_t = lr sqrt(1 - b2^t) / (1 - b1^t)`, `p <- p - lr_t m / (sqrt(v) + eps)` (Kingma & Ba 2015, the form at the end of
    section 2; tf.train.AdamOptimizer). All parameters move in fused multi-tensor operations.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = EPSILON,
    ) -> None:
        """`eps` is added to the uncorrected root of the second moment; 1e-5 in lm-human-preferences."""
        if not lr >= 0:
            raise InvalidArgument("lr", f"must not be negative, got {lr}")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise InvalidArgument("betas", f"must lie in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = {p: p.grad for p in group["params"] if p.grad is not None}
            if moved:
                self._move(moved, lr=group["lr"], betas=group["betas"], eps=group["eps"])
        return loss

    def _move(self, gradient_of: dict[Tensor, Tensor], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        params = list(gradient_of)
        states = [self._state_of(p) for p in params]
        for state in states:
            state["step"] += 1
        steps = {float(state["step"]) for state in states}
        for count in steps:  # one count unless a parameter had no gradient at some step
            chosen = [i for i, state in enumerate(states) if float(state["step"]) == count]
            gradients = [gradient_of[params[i]] for i in chosen]
            means = [states[i]["exp_avg"] for i in chosen]
            squares = [states[i]["exp_avg_sq"] for i in chosen]
            torch._foreach_lerp_(means, gradients, 1.0 - betas[0])
            torch._foreach_mul_(squares, betas[1])
            torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - betas[1])
            rate = lr * math.sqrt(1.0 - betas[1] ** count) / (1.0 - betas[0] ** count)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, eps)
            torch._foreach_addcdiv_([params[i] for i in chosen], means, roots, -rate)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            # Same names as torch's own Adam, so that one pair of functions stores either.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def build_optimizer(
    kind: OptimizerKind,
    params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = EPSILON,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Makes the optimizer that `kind` names.

    Args:
        kind: `adam_tf`, or torch's `adamw`.
        params: trainable parameters, or groups of them as torch takes them; see `set_rate`.
        lr: learning rate before the schedule.
        betas: decay of the first and second moment.
        eps: see the class.
        weight_decay: decoupled decay, where a group has none of its own; `adamw` only.

    Raises:
        InvalidArgument: it is asked of an optimizer that has none.
    """
    if kind == "adamw":
        return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    if weight_decay:
        raise InvalidArgument("learner.weight_decay", "the recipe's adam_tf has none; choose adamw or leave it 0")
    return TensorFlowAdam(params, lr=lr, betas=betas, eps=eps)


def decayed_matrices(params: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters whose matrices decay, while gains and biases do not."""
    listed = list(params)
    return [
        {"params": [p for p in listed if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in listed if p.ndim < 2], "weight_decay": 0.0},
    ]


def linear_rate(base: float, *, step: int, total: int) -> float:
    """Learning rate of update `step` (from 0) of `total`, falling linearly from `base`; 0 from `total` on.

    Raises:
        InvalidArgument: when `total` is not positive.
    """
    if total <= 0:
        raise InvalidArgument("total", f"must be positive, got {total}")
    return base * max(0.0, 1.0 - step / total)


def scheduled_rate(base: float, *, step: int, total: int | None, warmup: int = 0) -> float:
    """Learning rate of update `step`, from 0: it rises to `base` in `warmup` updates, and falls linearly over the others.

    Update `n` of the warm-up, from 1, has `n / warmup` of `base`: with 10, the first has a tenth, as InstructGPT's.

    Args:
        base: The highest rate.
        step: Updates that were made.
        total: All updates, warm-up included, over which it falls to 0; None keeps it at `base`.
        warmup: Fewer than `total`.

    Raises:
        InvalidArgument: when no update of `total` is left after the warm-up.
    """
    if total is not None and total <= warmup:
        raise InvalidArgument("total", f"must be positive, and more than the warm-up of {warmup}, got {total}")
    if step < warmup:
        return base * (step + 1) / warmup
    return base if total is None else linear_rate(base, step=step - warmup, total=total - warmup)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group; of one with a `rate_factor`, to so many times it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate_factor", 1.0)


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as flat names: `<parameter>/<slot>`; shares memory with the optimizer.

    Args:
        optimizer: one of `build_optimizer`.
        named: the parameters that it trains, by name.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in named.items():
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        tensors.update({f"{name}/{slot}": value for slot, value in state.items() if isinstance(value, Tensor)})
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_tensors` took; parameters without an entry start afresh.

    Raises:
        DataLoss: when an entry belongs to no parameter, or has another shape.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        parameter = named.get(name)
        if parameter is None:
            raise DataLoss(
                f"optimizer state {key!r} belongs to no parameter that trains: was the model changed, or what of it trains?"
            )
        if value.dim() and value.shape != parameter.shape:
            raise DataLoss(f"optimizer state {key!r} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}")
        # A scalar is a step count, which torch keeps on the host unless one kernel does it all.
        device = parameter.device if value.dim() or optimizer.defaults.get("fused") else torch.device("cpu")
        states.setdefault(name, {})[slot] = value.detach().to(device, copy=True)
    for name, parameter in named.items():
        optimizer.state[parameter] = states.get(name, {})
