"""One trainer for every algorithm: it makes the optimizer steps of an update, and knows no algorithm's name.

1. The algorithm reads the batch once, without gradient (`prepare`).
2. For each epoch a fresh permutation of the batch is cut into minibatches, each one optimizer step: the algorithm's losses of
   micro-batches are sums, divided by the *minibatch's* denominators, so that gradients add up to those of the mean however it
   was cut; then the gradient is checked, clipped if asked for, and applied.
3. The algorithm ends the update (`finish`): it moves what moves once a batch, and says what happened.

All randomness is in the generator that is passed in; all state is in `state()`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from honed.artifacts.version import VersionId
from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.learner.models.trained import Trained
from honed.learner.train import rng
from honed.learner.train.algorithm import Algorithm, B, BadLoss, Minibatch, UpdateContext
from honed.learner.train.average import WeightAverage
from honed.learner.train.optimizer import load_optimizer_tensors, optimizer_tensors, scheduled_rate, set_rate
from honed.learner.train.state import TrainerState

M = TypeVar("M", bound=Trained)

Metrics = Mapping[str, float]
"""Figures of one update by name; one that it could not tell is not there."""


@dataclass(frozen=True)
class TrainSettings:
    """The numbers of the trainer.

    Attributes:
        learning_rate: Before the schedule.
        total_updates: The rate falls linearly to 0 over so many updates; None keeps it constant.
        warmup_updates: The rate rises linearly in so many updates before it falls; see `scheduled_rate`.
        epochs: Passes over a batch.
        minibatches: Optimizer steps of an epoch.
        max_grad_norm: Gradients are scaled down to this 2-norm; None clips none.
        microbatch_tokens: Most tokens that the model reads at once. Bounds memory; does not change the
            result.
    """

    learning_rate: float = 1e-5
    total_updates: int | None = None
    warmup_updates: int = 0
    epochs: int = 4
    minibatches: int = 1
    max_grad_norm: float | None = None
    microbatch_tokens: int = 2048

    def __post_init__(self) -> None:
        """Refuses numbers that cannot work."""
        for name in ("epochs", "minibatches", "microbatch_tokens"):
            if getattr(self, name) < 1:
                raise InvalidArgument(name, f"must be at least 1, got {getattr(self, name)}")


class BadBatch(FailedPrecondition):
    """The update is not finite or explodes. Optimizer steps before the one that did stand: go back to the state before."""


class Interrupted(Exception):
    """The update was asked to stop. Optimizer steps that were made stand: go back to the state before."""


class Trainer(Generic[B, M]):
    """Holds all that training moves: the model, the optimizer, what the algorithm keeps, the generator, the version."""

    def __init__(
        self,
        model: M,
        algorithm: Algorithm[B],
        optimizer: torch.optim.Optimizer,
        *,
        settings: TrainSettings,
        generator: torch.Generator,
        average: WeightAverage | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Takes the parts; `optimizer` must train `model.trainable()`. `clock` only times updates.

        `average` follows `model.published`, update by update; training does not read it.
        """
        self.model, self.algorithm, self.optimizer, self.settings = model, algorithm, optimizer, settings
        self._generator, self.average, self._clock = generator, average, clock
        self.step = 0
        """Updates made: the version of the weights."""
        self._interrupted: Callable[[], bool] = lambda: False

    def update(
        self,
        batch: B,
        *,
        version: VersionId | None = None,
        rate: float | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Metrics:
        """Trains on the batch once and returns what happened.

        Args:
            batch: Examples of the algorithm's kind; fewer than there are minibatches are a minibatch each.
            version: Of the weights before this update, to tell numerical difference from staleness.
            rate: The learning rate; None for that of the settings' schedule.
            interrupted: Asked before each pass of the model whether to stop.

        Raises:
            BadBatch: A gradient or the weights are not finite, or the algorithm refuses what it computed.
            Interrupted: It was asked to stop.
        """
        self._interrupted = interrupted
        start = self._clock()
        settings = self.settings
        if rate is None:
            rate = scheduled_rate(
                settings.learning_rate, step=self.step, total=settings.total_updates, warmup=settings.warmup_updates
            )
        set_rate(self.optimizer, rate)
        try:
            whole = settings.minibatches == 1
            context = UpdateContext(self.step, version, settings.microbatch_tokens, self._stop_if_asked, whole)
            prepared = self.algorithm.prepare(batch, context)
            norms = [self._step(prepared.minibatch(chosen)) for chosen in self._minibatches(len(prepared))]
            self._check_weights()
            figures = prepared.finish()
        except BadLoss as error:
            raise BadBatch(f"update {self.step + 1}: {error}; the batch was not applied") from error
        self.step += 1
        if self.average is not None:
            self.average.add()
        return {
            **figures,
            "lr": rate,
            "grad_norm": sum(norms) / max(1, len(norms)),
            "optimizer_steps": float(len(norms)),
            "seconds": self._clock() - start,
        }

    def state(self) -> TrainerState:
        """All that `load_state` needs to go on bit for bit; tensors share memory with the trainer."""
        return TrainerState(
            step=self.step,
            model=self.model.tensors(),
            optimizer=optimizer_tensors(self.optimizer, self.model.trainable()),
            generator=rng.generator_state(self._generator),
            algorithm=self.algorithm.state(),
            average=self.average.tensors() if self.average is not None else {},
        )

    def load_state(self, state: TrainerState) -> None:
        """Goes on from `state`; frozen models and the settings are not part of it.

        Raises:
            DataLoss: when it belongs to another model.
        """
        self.model.load_tensors(state.model)
        load_optimizer_tensors(self.optimizer, self.model.trainable(), state.optimizer)
        rng.load_generator_state(self._generator, state.generator)
        self.algorithm.load_state(state.algorithm)
        if self.average is not None:
            self.average.load_tensors(state.average)
        self.step = state.step

    def restart(self, weights: Mapping[str, Tensor], *, step: int) -> None:
        """Goes on from the weights of a published version: they alone are kept of it, so optimizer and average start afresh.

        Heads and what the algorithm keeps stay as they are, and so do weights that do not train: a version may hold them with
        fewer digits.
        """
        own = self.model.published.state_dict(keep_vars=True)
        self.model.published.load_state_dict(
            {name: weights[name] if tensor.requires_grad else tensor for name, tensor in own.items()}
        )
        self.optimizer.state.clear()
        if self.average is not None:
            self.average.restart()
        self.step = step

    def _minibatches(self, count: int) -> Iterator[list[int]]:
        """Indices of each minibatch, epoch by epoch: a fresh permutation each epoch, cut into nearly equal parts.

        An algorithm may make fewer examples of a batch than it has rollouts; fewer than there are minibatches are one each.
        """
        for _ in range(self.settings.epochs if count else 0):
            order = torch.randperm(count, generator=self._generator)
            for part in order.tensor_split(min(self.settings.minibatches, count)):
                yield part.tolist()

    def _step(self, minibatch: Minibatch) -> float:
        """One optimizer step; returns the gradient's norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        for micro in minibatch.micro_batches:
            self._stop_if_asked()
            terms = minibatch.losses(micro)
            losses = [total / minibatch.denominators[name] for name, total in terms.items()]
            torch.autograd.backward(losses)
        minibatch.check()
        norm = self._gradient_norm()
        self.optimizer.step()
        return norm

    def _gradient_norm(self) -> float:
        """The gradient's 2-norm before clipping; clips if the settings say so."""
        gradients = [p.grad for p in self.model.trainable().values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if not bool(torch.isfinite(norm)):
            raise BadLoss(f"the gradient's norm is {float(norm)}: lower the learning rate if it happens again")
        if self.settings.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                list(self.model.trainable().values()), self.settings.max_grad_norm, norm, foreach=True
            )
        return float(norm)

    def _check_weights(self) -> None:
        """Checks what the next update starts from."""
        norm = torch.nn.utils.get_total_norm([p.detach() for p in self.model.trainable().values()], foreach=True)
        if not bool(torch.isfinite(norm)):
            raise BadLoss(f"the norm of the weights is {float(norm)}")

    def _stop_if_asked(self) -> None:
        if self._interrupted():
            raise Interrupted
