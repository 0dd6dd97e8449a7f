"""From the settings to the trainer: device, models, optimizer, KL controller, reward normalisation."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Final

import torch

from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition
from honed.learner.algorithms.base import OnPairs, find_algorithm, make_algorithm
from honed.learner.critic_start import CriticStart
from honed.learner.data.episode import Vocabulary
from honed.learner.models.policy import PolicyModel, ReferenceModel
from honed.learner.models.recompute import recompute_layers
from honed.learner.models.threads import beside_generation, use_threads
from honed.learner.models.upper_layers import UpperReference, freeze_lower_layers
from honed.learner.objectives.kl import AdaptiveKL, FixedKL, KLController, RL4LMsKL
from honed.learner.objectives.normalise import FittedOnFirstBatch, GainBias, RewardNormaliser, Running
from honed.learner.settings import KlSettings, LearnerSettings
from honed.learner.sources.mixed_in import examples_of
from honed.learner.supervised.language_model import NextToken
from honed.learner.train import rng
from honed.learner.train.algorithm import Algorithm
from honed.learner.train.average import WeightAverage
from honed.learner.train.mixture import MixedIn, Mixture
from honed.learner.train.on_labelled import OnLabelledUpdates
from honed.learner.train.on_pairs import OnPairUpdates
from honed.learner.train.on_policy import OnPolicyUpdates
from honed.learner.train.on_scored_pairs import OnScoredPairs
from honed.learner.train.optimizer import EPSILON, build_optimizer, decayed_matrices
from honed.learner.train.trainer import Trainer, TrainSettings
from honed.models.facts import ModelFacts
from honed.models.loader import load_language_model
from honed.settings import ServerSettings


def build_trainer(settings: RunSettings, base: Path, critic: CriticStart | None = None) -> Trainer[Any, PolicyModel]:
    """A trainer that starts from the model at `base`, which is also the reference.

    Args:
        settings: Of the run.
        base: A model directory.
        critic: What a separate critic starts from; None: `base`.

    Raises:
        FailedPrecondition: the device is not there.
        DataLoss: `base` is damaged or incomplete.
        InvalidArgument: the model cannot read as many tokens as the generator may sample, or has not so many layers to train;
            or what is mixed in is not there.
    """
    section = settings.learner
    facts = ModelFacts.read(base)
    facts.check_length(settings.generation.max_model_tokens)
    if section.unfrozen_layers is not None:
        facts.check_layers(section.unfrozen_layers)
    device = choose_device(section.device)
    make_deterministic(device, section.deterministic)
    values = None
    if section.critic == "separate":
        values = (critic or CriticStart(base, is_reward_model=False)).load(device, section.precision)
        if section.gradient_checkpointing:
            recompute_layers(values.language_model)
    language_model = load_language_model(base, device=device)
    if device.type == "cpu":
        use_threads(section.threads or section.own_cores, language_model, beside_generation(settings))
    if section.unfrozen_layers is not None:
        freeze_lower_layers(language_model, section.unfrozen_layers)
    policy = PolicyModel(language_model, precision=section.precision, recompute=section.gradient_checkpointing, critic=values)
    reference: ReferenceModel | None = None
    if make_algorithm(section).needs.reference:
        reference = (
            ReferenceModel(load_language_model(base, device=device), precision=section.precision)
            if section.unfrozen_layers is None
            else UpperReference(policy, section.unfrozen_layers, precision=section.precision)
        )
    optimizer = build_optimizer(
        section.optimizer,
        parameter_groups(section, policy),
        lr=section.learning_rate,
        betas=section.betas,
        eps=EPSILON if section.epsilon is None else section.epsilon,
        weight_decay=section.weight_decay,
    )
    updates = updates_of(section, policy, reference, settings.conductor.response_tokens)
    if section.ptx is not None:
        mixed_in = MixedIn(
            section.ptx.coefficient, section.ptx.examples, section.batch, examples_of(settings, section.ptx, base)
        )
        updates = Mixture(updates, NextToken(policy), mixed_in)
    average = None if section.ema_decay is None else WeightAverage(policy.published, section.ema_decay)
    generator = rng.generator(settings.seed)
    return Trainer(policy, updates, optimizer, settings=train_settings(section), generator=generator, average=average)


def parameter_groups(section: LearnerSettings, policy: PolicyModel) -> list[dict[str, Any]]:
    """What the optimizer moves: a separate critic may do so at a rate of its own, and matrices alone decay."""
    trainable = policy.trainable()
    critics = [parameter for name, parameter in trainable.items() if name.startswith("critic.")]
    others = [parameter for name, parameter in trainable.items() if not name.startswith("critic.")]
    groups: list[dict[str, Any]] = [{"params": others}]
    if critics:
        factor = (section.critic_learning_rate or section.learning_rate) / section.learning_rate
        groups.append({"params": critics, "rate_factor": factor})
    if not section.weight_decay:
        return groups
    split = [{**group, **part} for group in groups for part in decayed_matrices(group["params"], section.weight_decay)]
    return [group for group in split if group["params"]]


def updates_of(
    section: LearnerSettings, policy: PolicyModel, reference: ReferenceModel | None, response_tokens: int | None = None
) -> Algorithm[Any]:
    """The algorithm of the settings, around its models.

    Args:
        section: The settings.
        policy: Learns.
        reference: Stays as it is; None where the algorithm needs none.
        response_tokens: The most tokens that a response may have; None where that is not known.
    """
    algorithm: Any = make_algorithm(section)
    found = find_algorithm(section.algorithm)
    learns_from = found.learns_from
    if isinstance(algorithm, OnPairs):
        updates = OnPairUpdates(algorithm, policy, reference)
        return updates if learns_from == "preferences" else OnScoredPairs(updates)
    if learns_from == "labels":
        return OnLabelledUpdates(algorithm, policy, reference)
    kl = FixedKL(0.0) if "kl" in found.unread else kl_controller(section.kl)
    return OnPolicyUpdates(
        algorithm,
        policy,
        reference,
        section,
        kl=kl,
        normaliser=reward_normaliser(section),
        response_tokens=response_tokens,
    )


def vocabulary_of(base: Path, size: int) -> Vocabulary:
    """What responses may hold, by the files of the base model.

    Args:
        base: Its directory.
        size: Rows of its output layer; often more than its tokenizer has tokens.
    """
    facts = ModelFacts.read(base)
    return Vocabulary(size, facts.pad_token_id, facts.end_token_ids)


def make_deterministic(device: torch.device, asked: bool | None) -> None:
    """Makes two runs on the same data give the same bits, on one kind of device with one build of torch (P6).

    On a CPU the kernels that training uses are deterministic as they are. On a GPU the
    gradient of reading rows (`index_select`, embeddings) adds in an order that varies; its
    deterministic form sorts first, and matrix products need a workspace of fixed size. An operation
    without a deterministic form raises.

    Args:
        device: Where training runs.
        asked: `learner.deterministic`; None is yes on a CPU and no elsewhere.
    """
    wanted = device.type == "cpu" if asked is None else asked
    if wanted and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)
    # torch would then fill all new memory with NaN, to show a kernel that reads what nobody wrote: a tenth of a small model's
    # update. The bits are the same without.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # of the module's class


def choose_device(name: str, *, setting: str = "learner.device") -> torch.device:
    """The device of a name; `auto` takes CUDA where there is one.

    Raises:
        FailedPrecondition: CUDA is named and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise FailedPrecondition(f"{setting} is {name}, and torch sees no GPU here: set it to auto or cpu")
    return torch.device(name)


def train_settings(section: LearnerSettings) -> TrainSettings:
    """The trainer's numbers."""
    return TrainSettings(
        learning_rate=section.learning_rate,
        total_updates=None if section.schedule == "constant" else section.steps,  # auto is linear where there is an end
        epochs=section.epochs or find_algorithm(section.algorithm).epochs,
        minibatches=section.minibatches,
        warmup_updates=section.warmup_steps,
        max_grad_norm=section.gradient_norm,
        microbatch_tokens=section.microbatch_tokens,
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


def reward_normaliser(section: LearnerSettings) -> RewardNormaliser:
    """The normalisation that the settings name."""
    match section.reward_normalisation:
        case "reference":
            return FittedOnFirstBatch(GainBias(clip=section.reward_clip))
        case "running":
            return Running(clip=section.reward_clip)
        case "none":
            return GainBias(clip=section.reward_clip)


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
    | {"own_cores", "update_timeout_s", "journal_mb", "gradient_checkpointing"}
)
"""Settings of the section that say how the service runs, not what it learns."""
