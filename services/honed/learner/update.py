"""One PPO update, from scored episodes to moved weights: lm-human-preferences' algorithm, decoupled for stale data.

1. One pass without gradient reads the batch with the policy (proximal log-probabilities, values, entropy) and the reference.
2. Token rewards: `-beta (proximal - reference)`, and the normalised score at the last action token.
3. For each epoch and minibatch: whiten rewards, estimate advantages, whiten them; then for each micro-batch the clipped losses,
   with the policy loss weighted by the truncated ratio of proximal to behaviour policy; one optimizer step.
4. The KL controller moves once.

On fresh data from the same weights the behaviour weight is 1 and this is plain PPO. All randomness is in the generator that is
passed in; all state is in `state()`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from honed.artifacts.version import VersionId
from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.learner import advantage, rng
from honed.learner.batches import MicroBatch, Rows, micro_batches, padding_share
from honed.learner.episodes import Episode
from honed.learner.kl import KLController
from honed.learner.model import PolicyModel, ReferenceModel
from honed.learner.normalise import RewardNormaliser, batch_rewards, is_constant
from honed.learner.objectives import ppo
from honed.learner.optimizer import linear_rate, load_optimizer_tensors, optimizer_tensors, set_rate
from honed.learner.stats import MeanOverTokens, UpdateStats, same_weights_mask
from honed.learner.trainer_state import TrainerState


@dataclass(frozen=True)
class PPOSettings:
    """The numbers of the algorithm; defaults are lm-human-preferences' for stylistic tasks."""

    learning_rate: float = 1e-5
    total_updates: int | None = None
    """The rate falls linearly to 0 over so many updates; None keeps it constant."""
    epochs: int = 4
    minibatches: int = 1
    clip_ratio: float = 0.2
    clip_value: float = 0.2
    value_coefficient: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = True
    importance_cap: float = 2.0
    """Cap of a stale token's importance weight."""
    max_grad_norm: float | None = None
    """None clips no gradient, as the recipe."""
    microbatch_tokens: int = 2048
    """Most tokens, padding included, that the model reads at once. Bounds memory; does not change the result."""
    max_ratio: float = 100.0
    """A batch whose mean ratio to the sampler's or the proximal policy passes this, or falls under its inverse, is refused."""

    def __post_init__(self) -> None:
        """Refuses numbers that cannot work."""
        for name in ("epochs", "minibatches", "microbatch_tokens"):
            if getattr(self, name) < 1:
                raise InvalidArgument(name, f"must be at least 1, got {getattr(self, name)}")
        if self.importance_cap < 1.0:
            raise InvalidArgument("importance_cap", f"must be at least 1, got {self.importance_cap}")
        for name in ("clip_ratio", "clip_value"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(name, f"must be positive, got {getattr(self, name)}")


class BadBatch(FailedPrecondition):
    """The update is not finite or explodes. Optimizer steps before the one that did stand: go back to the state before."""


class Interrupted(Exception):
    """The update was asked to stop. Optimizer steps that were made stand: go back to the state before."""


@dataclass(frozen=True)
class _Measured:
    """The batch before the update, rows `[B, T]` on the host, zero on pads."""

    rows: Rows
    proximal: Tensor
    reference: Tensor
    values: Tensor
    rewards: Tensor
    weights: Tensor
    entropy: float


class PPOTrainer:
    """Holds all that training moves: policy, optimizer, KL coefficient, reward normalisation, generator, version."""

    def __init__(
        self,
        policy: PolicyModel,
        reference: ReferenceModel,
        optimizer: torch.optim.Optimizer,
        *,
        kl: KLController,
        normaliser: RewardNormaliser,
        settings: PPOSettings,
        generator: torch.Generator,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Takes the parts; `optimizer` must train `policy.trainable()`. `clock` only times updates."""
        self.policy, self.reference, self.optimizer = policy, reference, optimizer
        self.kl, self.normaliser, self.settings = kl, normaliser, settings
        self._generator, self._clock = generator, clock
        self.step = 0
        """Updates made: the version of the weights."""
        self._interrupted: Callable[[], bool] = lambda: False

    def update(
        self,
        episodes: Sequence[Episode],
        *,
        version: VersionId | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> UpdateStats:
        """Trains on the episodes once and returns what happened.

        Args:
            episodes: the batch; at least as many as there are minibatches.
            version: of the weights before this update, to tell numerical difference from staleness.
            interrupted: asked before each pass of the model whether to stop.

        Raises:
            InvalidArgument: when there are too few episodes.
            BadBatch: when a gradient or the weights are not finite, or a mean ratio is out of bounds.
            Interrupted: when asked to.
        """
        self._interrupted = interrupted
        start = self._clock()
        settings = self.settings
        if len(episodes) < settings.minibatches:
            raise InvalidArgument("episodes", f"{len(episodes)} episodes cannot fill {settings.minibatches} minibatches")
        total = settings.total_updates
        rate = settings.learning_rate if total is None else linear_rate(settings.learning_rate, step=self.step, total=total)
        set_rate(self.optimizer, rate)

        everything = self._pack(episodes, range(len(episodes)), Rows.of(episodes).mask.shape[1])
        beta = self.kl.value
        measured = self._measure(episodes, everything, beta)
        self._check_ratio("sampler", float((measured.proximal - measured.rows.behaviour)[measured.rows.mask].exp().mean()))
        means, norms, ratio_max = MeanOverTokens(), [], 0.0
        for chosen in self._minibatches(len(episodes)):
            whole = settings.minibatches == 1
            packed = everything if whole else self._pack(episodes, chosen, measured.rows.mask.shape[1])
            norm, largest = self._step(measured, chosen, packed, means)
            norms.append(norm)
            ratio_max = max(ratio_max, largest)

        kl = float((measured.proximal - measured.reference).sum(1).mean())
        self._check_finite(kl)
        self.kl.update(kl, len(episodes))
        self.step += 1
        mask = measured.rows.mask
        gap = (measured.proximal - measured.rows.behaviour).abs().exp()
        same = same_weights_mask(episodes, version, mask) if version is not None else torch.zeros_like(mask)
        scores = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
        return UpdateStats(
            episodes=len(episodes),
            tokens=int(mask.sum()),
            reward_mean=float(measured.rewards.sum(1).mean()),
            score_mean=float(scores.mean()),
            score_std=float(scores.std(correction=0)),
            reward_constant=float(is_constant([e.reward for e in episodes])),
            kl=kl,
            entropy=measured.entropy,
            approxkl=means["approxkl"],
            clip_fraction=means["clipped"],
            policy_loss=means["policy_loss"],
            value_loss=means["value_loss"],
            ratio_max=ratio_max,
            ratio_mean=means["ratio"],
            behaviour_weight=float(measured.weights[mask].mean()),
            behaviour_truncated=float((measured.weights[mask] >= settings.importance_cap).float().mean()),
            sampler_gap=float(gap[mask].mean()),
            sampler_gap_same_weights=float(gap[same].mean()) if bool(same.any()) else None,
            beta=beta,
            next_beta=self.kl.value,
            lr=rate,
            grad_norm=sum(norms) / len(norms),
            optimizer_steps=len(norms),
            padding_share=padding_share(everything),
            masked_share=measured.rows.empty_share,
            seconds=self._clock() - start,
        )

    def state(self) -> TrainerState:
        """All that `load_state` needs to go on bit for bit; tensors share memory with the trainer."""
        return TrainerState(
            step=self.step,
            model=self.policy.tensors(),
            optimizer=optimizer_tensors(self.optimizer, self.policy.trainable()),
            generator=rng.generator_state(self._generator),
            kl=self.kl.state(),
            normaliser=self.normaliser.state(),
        )

    def load_state(self, state: TrainerState) -> None:
        """Goes on from `state`; the reference and the settings are not part of it.

        Raises:
            DataLoss: when it belongs to another model.
        """
        self.policy.load_tensors(state.model)
        load_optimizer_tensors(self.optimizer, self.policy.trainable(), state.optimizer)
        rng.load_generator_state(self._generator, state.generator)
        self.kl.load_state(state.kl)
        self.normaliser.load_state(state.normaliser)
        self.step = state.step

    def restart(self, weights: Mapping[str, Tensor], *, step: int) -> None:
        """Goes on from the weights of a published version: they alone are kept of it, so the optimizer starts afresh.

        Value head, KL coefficient and reward normalisation stay as they are.
        """
        self.policy.language_model.load_state_dict(weights)
        self.optimizer.state.clear()
        self.step = step

    def _pack(self, episodes: Sequence[Episode], chosen: Sequence[int], width: int) -> list[MicroBatch]:
        packed = micro_batches(episodes, chosen, max_tokens=self.settings.microbatch_tokens, width=width)
        return [batch.to(self.policy.device) for batch in packed]

    def _minibatches(self, count: int) -> Iterator[list[int]]:
        """Indices of each minibatch, epoch by epoch: a fresh permutation each epoch, cut into nearly equal parts."""
        for _ in range(self.settings.epochs):
            order = torch.randperm(count, generator=self._generator)
            for part in order.tensor_split(self.settings.minibatches):
                yield part.tolist()

    @torch.no_grad()
    def _measure(self, episodes: Sequence[Episode], packed: Sequence[MicroBatch], beta: float) -> _Measured:
        rows = Rows.of(episodes)
        proximal, reference, values = (torch.zeros(rows.mask.shape) for _ in range(3))
        means = MeanOverTokens()
        for batch in packed:
            self._stop_if_asked()
            measured = self.policy.measure(batch)
            slots = batch.slots.cpu()
            proximal.view(-1)[slots] = measured.logprobs.cpu()
            values.view(-1)[slots] = measured.values.cpu()
            reference.view(-1)[slots] = self.reference.logprobs(batch).cpu()
            means.add(entropy=measured.entropies)
        scores = torch.tensor(batch_rewards(self.normaliser, episodes))
        return _Measured(
            rows=rows,
            proximal=proximal,
            reference=reference,
            values=values,
            rewards=advantage.token_rewards(proximal, reference, scores, rows.mask, beta=beta),
            weights=ppo.behaviour_weights(proximal, rows.behaviour, self.settings.importance_cap),
            entropy=means["entropy"],
        )

    def _step(
        self, measured: _Measured, chosen: Sequence[int], packed: Sequence[MicroBatch], means: MeanOverTokens
    ) -> tuple[float, float]:
        """One optimizer step on one minibatch; returns the gradient's norm and the largest ratio."""
        settings, device = self.settings, self.policy.device
        index = torch.tensor(sorted(chosen))
        mask = measured.rows.mask[index]
        estimated = advantage.estimate(
            measured.rewards[index],
            measured.values[index],
            mask,
            gamma=settings.gamma,
            lam=settings.lam,
            whiten_rewards=settings.whiten_rewards,
        )
        advantages, returns = torch.zeros_like(measured.values), torch.zeros_like(measured.values)
        advantages[index], returns[index] = estimated.advantages, estimated.returns
        tokens = int(mask.sum())
        self.optimizer.zero_grad(set_to_none=True)
        largest, ratios = torch.zeros((), device=device), torch.zeros((), dtype=torch.float64, device=device)
        for batch in packed:
            self._stop_if_asked()
            slots = batch.slots.cpu()

            def pick(rows: Tensor, slots: Tensor = slots) -> Tensor:
                return rows.view(-1)[slots].to(device)

            proximal, chosen_advantages = pick(measured.proximal), pick(advantages)
            now = self.policy.evaluate(batch)
            policy_loss = ppo.policy_loss_terms(
                now.logprobs, proximal, chosen_advantages, clip=settings.clip_ratio, weights=pick(measured.weights)
            )
            value_loss = ppo.value_loss_terms(now.values, pick(measured.values), pick(returns), clip=settings.clip_value)
            # Divided by the minibatch's tokens, so that gradients of micro-batches add up to that of the mean.
            loss = (policy_loss + settings.value_coefficient * value_loss).sum() / tokens
            torch.autograd.backward(loss)
            detached = now.logprobs.detach()
            largest = torch.maximum(largest, (detached - proximal).max())
            ratio = (detached - proximal).exp()
            ratios += ratio.sum(dtype=torch.float64)
            means.add(
                policy_loss=policy_loss,
                value_loss=value_loss,
                approxkl=ppo.approximate_kl_terms(detached, proximal),
                clipped=ppo.clipped_terms(detached, proximal, chosen_advantages, clip=settings.clip_ratio),
                ratio=ratio,
            )
        self._check_ratio("proximal policy", float(ratios) / tokens)
        norm = self._gradient_norm()
        self.optimizer.step()
        return norm, float(largest.exp())

    def _gradient_norm(self) -> float:
        """The gradient's 2-norm before clipping; clips if the settings say so."""
        gradients = [p.grad for p in self.policy.trainable().values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if not bool(torch.isfinite(norm)):
            raise BadBatch(
                f"update {self.step + 1}: the gradient's norm is {float(norm)}; the batch was not applied. Lower the learning "
                "rate if it happens again"
            )
        if self.settings.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                list(self.policy.trainable().values()), self.settings.max_grad_norm, norm, foreach=True
            )
        return float(norm)

    def _check_ratio(self, to: str, mean: float) -> None:
        bound = self.settings.max_ratio
        if not 1 / bound <= mean <= bound:
            raise BadBatch(
                f"update {self.step + 1}: the mean ratio to the {to} is {mean:.3g}, learner.max_ratio allows {1 / bound:g} to "
                f"{bound:g}; the batch was not applied"
            )

    def _check_finite(self, kl: float) -> None:
        """Checks what the next update starts from: the weights, and the KL that moves the coefficient."""
        norm = torch.nn.utils.get_total_norm([p.detach() for p in self.policy.trainable().values()], foreach=True)
        if not (bool(torch.isfinite(norm)) and math.isfinite(kl)):
            raise BadBatch(f"update {self.step + 1}: norm of the weights {float(norm)}, KL {kl}; the batch was not applied")

    def _stop_if_asked(self) -> None:
        if self._interrupted():
            raise Interrupted
