"""From the settings to the trainer: device, models, optimizer, KL controller, reward normalisation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from honed.config import KlSettings, LearnerSettings, RunSettings, ServerSettings
from honed.kit.errors import FailedPrecondition
from honed.learner import rng
from honed.learner.kl import AdaptiveKL, FixedKL, KLController, RL4LMsKL
from honed.learner.model import PolicyModel, ReferenceModel, load_language_model
from honed.learner.normalise import GainBias, RewardNormaliser, Running
from honed.learner.optimizer import build_optimizer
from honed.learner.update import PPOSettings, PPOTrainer


def build_trainer(settings: RunSettings, base: Path) -> PPOTrainer:
    """A trainer that starts from the model at `base`, which is also the reference.

    Raises:
        FailedPrecondition: the device is not there.
        InvalidArgument: `base` holds no causal language model.
    """
    mine = settings.learner
    device = choose_device(mine.device)
    if device.type == "cpu":
        torch.set_num_threads(mine.threads)
    # Two runs on the same data give the same bits.
    torch.use_deterministic_algorithms(device.type == "cpu")
    policy = PolicyModel(load_language_model(base, device=device), precision=mine.precision)
    reference = ReferenceModel(load_language_model(base, device=device), precision=mine.precision)
    optimizer = build_optimizer(mine.optimizer, policy.trainable().values(), lr=mine.learning_rate)
    return PPOTrainer(
        policy,
        reference,
        optimizer,
        kl=kl_controller(mine.kl),
        normaliser=reward_normaliser(mine),
        settings=ppo_settings(mine),
        generator=rng.generator(settings.seed),
    )


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` takes CUDA where there is one.

    Raises:
        FailedPrecondition: CUDA is named and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise FailedPrecondition(f"learner.device is {name}, and torch sees no GPU here: set it to auto or cpu")
    return torch.device(name)


def ppo_settings(mine: LearnerSettings) -> PPOSettings:
    """The algorithm's numbers."""
    return PPOSettings(
        learning_rate=mine.learning_rate,
        total_updates=None if mine.schedule == "constant" else mine.steps,  # auto is linear where there is an end
        epochs=mine.epochs,
        minibatches=mine.minibatches,
        clip_ratio=mine.clip_ratio,
        clip_value=mine.clip_value,
        value_coefficient=mine.value_coefficient,
        gamma=mine.gamma,
        lam=mine.lam,
        importance_cap=mine.importance_cap,
        microbatch_tokens=mine.microbatch_tokens,
        max_ratio=mine.max_ratio,
    )


def kl_controller(kl: KlSettings) -> KLController:
    """The controller that the settings name."""
    match kl.controller:
        case "adaptive":
            return AdaptiveKL(kl.coefficient, target=kl.target, horizon=kl.horizon)
        case "rl4lms":
            return RL4LMsKL(kl.coefficient, target=kl.target)
        case "fixed":
            return FixedKL(kl.coefficient)


def reward_normaliser(mine: LearnerSettings) -> RewardNormaliser:
    """The normalisation that the settings name."""
    match mine.reward_normalisation:
        case "reference":
            return FittedOnFirstBatch(GainBias(clip=mine.reward_clip))
        case "running":
            return Running(clip=mine.reward_clip)
        case "none":
            return GainBias(clip=mine.reward_clip)


class FittedOnFirstBatch:
    """Gain and bias set on the first batch of a run, which the reference policy sampled (recipe detail 7), then fixed."""

    def __init__(self, inner: GainBias) -> None:
        """Fits `inner`."""
        self._inner = inner
        self._fitted = False

    def __call__(self, scores: Sequence[float]) -> list[float]:
        """Fits at the first call; applies gain and bias."""
        if not self._fitted:
            self._inner.fit(scores)
            self._fitted = True
        return self._inner(scores)

    def state(self) -> dict[str, float]:
        """Gain, bias, and whether they are set."""
        return {**self._inner.state(), "fitted": float(self._fitted)}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Goes on from `state`."""
        self._inner.load_state(state)
        self._fitted = bool(state["fitted"])


def config_hash(settings: RunSettings) -> str:
    """Digest of the settings that decide what is learned."""
    tree = {
        "seed": settings.seed,
        "learner": settings.learner.model_dump(mode="json", exclude=set(NOT_LEARNED)),
        "conductor": settings.conductor.model_dump(
            mode="json", include={"samples_per_prompt", "temperature", "response_tokens", "fixed_length"}
        ),
        "reward": settings.reward.model_dump(mode="json", include={"scorers", "truncate"}),
    }
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


NOT_LEARNED: Final = frozenset(LearnerSettings.model_fields) & (
    frozenset(ServerSettings.model_fields)
    | {"threads", "checkpoint_every", "keep_checkpoints", "push_timeout_s", "overlap_push", "on_refused", "bad_batches"}
    | {"update_timeout_s", "journal_mb"}
)
"""Settings of the section that say how the service runs, not what it learns."""
