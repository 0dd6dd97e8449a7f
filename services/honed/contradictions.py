"""What settings demand of each other: values that are each allowed and that together fail, or mislead, hours later."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from honed.phases import impossible_phases, serves_reward

if TYPE_CHECKING:  # the tree itself asks here
    from honed.config import RunSettings
    from honed.reward.settings import RewardSettings, ScorerSettings

_KL_CLIP: Final = 0.2  # `learner.objectives.kl.AdaptiveKL`
_OF_STEPS: Final = ("learning_rate", "warmup", "batch_texts", "gradient_norm", "embedding_dropout", "weight_decay", "seconds")
_SHORTEST_LEASE_S: Final = 0.5  # three renewals have to arrive within it


def contradictions(settings: RunSettings) -> list[str]:
    """Every contradiction, with the field's name and what to do."""
    return [
        *impossible_phases(settings),
        *_of_data(settings),
        *_of_learner(settings),
        *_of_reward(settings),
        *_of_reward_training(settings),
        *_of_generation(settings),
        *_of_conductor(settings),
    ]


def _of_data(settings: RunSettings) -> Iterator[str]:
    made, launcher = settings.data.made, settings.conductor.launcher
    if made is not None and settings.conductor.services_elsewhere:
        yield (
            f"data.made: {made} is made where one command starts everything, and conductor.launcher is {launcher}: write it by "
            f"`honed data prepare {made} --to DIRECTORY`, and name the files"
        )


def _of_learner(settings: RunSettings) -> Iterator[str]:
    from honed.kit.errors import InvalidArgument
    from honed.learner.algorithms.base import find_algorithm, make_algorithm

    learner, kl = settings.learner, settings.learner.kl
    try:
        group = make_algorithm(learner).needs.group
        found = find_algorithm(learner.algorithm)
        unread, pairs = found.unread, found.learns_from == "preferences"
    except InvalidArgument as error:
        yield str(error)
        group, unread, pairs = 1, frozenset(), False
    for name, field in type(learner).model_fields.items():
        if name in unread and getattr(learner, name) != field.default:
            yield f"learner.{name}: {learner.algorithm} does not read it: leave it out"
    threshold = type(learner.preferences).model_fields["rating_threshold"].default
    if pairs and learner.preferences.rating_threshold != threshold:
        yield f"learner.preferences.rating_threshold: {learner.algorithm} learns from pairs and does not read it: leave it out"
    samples = settings.conductor.samples_per_prompt
    if samples < group:
        yield (
            f"conductor.samples_per_prompt: {samples}, and {learner.algorithm} compares responses to one prompt: take {group} "
            "or more"
        )
    if learner.critic == "separate" and not learner.value_coefficient:
        yield "learner.critic: with learner.value_coefficient: 0 a separate critic learns nothing: take more, or shared"
    if learner.critic == "shared" and learner.critic_learning_rate is not None:
        yield (
            "learner.critic_learning_rate: a value head on the policy learns at learner.learning_rate: remove it, or take "
            "learner.critic: separate"
        )
    if learner.weight_decay and learner.optimizer != "adamw":
        yield f"learner.weight_decay: {learner.optimizer} has none: take learner.optimizer: adamw, or leave it out"
    if learner.steps is not None and learner.warmup_steps >= learner.steps:
        yield (
            f"learner.warmup_steps: {learner.warmup_steps}, and learner.steps: {learner.steps} would all be warm-up: take "
            "fewer than that"
        )
    if learner.ema_decay is not None and learner.steps is None:
        yield (
            "learner.ema_decay: the average of the weights becomes the last version, and with learner.steps: null there is no "
            "last one: set steps, or remove ema_decay"
        )
    if learner.minibatches > learner.batch:
        yield (
            f"learner.minibatches: {learner.minibatches} cannot be filled by learner.batch = {learner.batch} rollouts: "
            "take fewer minibatches, or a larger batch"
        )
    if learner.batch == 1 and learner.reward_normalisation == "reference" and "reward_normalisation" not in unread:
        yield (
            "learner.batch: one rollout has no spread to set the reward's gain by, and every reward would be 0: take at least "
            "2, or learner.reward_normalisation: none"
        )
    if "kl" not in unread and kl.controller == "adaptive" and kl.horizon <= _KL_CLIP * learner.batch:
        yield (
            f"learner.kl.horizon: with {kl.horizon}, one update of learner.batch = {learner.batch} rollouts can turn the "
            f"coefficient to 0 or below, for ever: take more than {_KL_CLIP * learner.batch:g}, some batches at least"
        )
    yield from _of_cores(settings)
    yield from _of_mixture(settings)
    if settings.queue.lease_s < _SHORTEST_LEASE_S:
        yield f"queue.lease_s: {settings.queue.lease_s:g} s end before a renewal arrives: take {_SHORTEST_LEASE_S:g} or more"


def _of_cores(settings: RunSettings) -> Iterator[str]:
    own, threads, launcher = settings.learner.own_cores, settings.learner.threads, settings.conductor.launcher
    if own is None:
        return
    if settings.conductor.services_elsewhere:
        yield (
            f"learner.own_cores: is for processes of one machine, and conductor.launcher is {launcher}: leave it out, and give "
            "the learner's Pod its processors by its requests and limits"
        )
    if threads is not None and threads > own:
        yield f"learner.own_cores: {own}, and learner.threads: {threads} would not fit on them: take more, or fewer threads"


def _of_mixture(settings: RunSettings) -> Iterator[str]:
    mix, longest = settings.learner.ptx, settings.generation.max_model_tokens
    if mix is None:
        return
    if not getattr(settings.data, mix.data):
        yield f"learner.ptx.data: is {mix.data}, and data.{mix.data} names none: name some, or leave learner.ptx out"
    if mix.data == "texts" and mix.block_tokens > longest:
        yield (
            f"learner.ptx.block_tokens: {mix.block_tokens} are more than the model reads, generation.max_model_tokens = "
            f"{longest}: take fewer"
        )


def _of_reward(settings: RunSettings) -> Iterator[str]:
    reward = settings.reward
    for name, count in Counter(scorer.name for scorer in reward.scorers).items():
        if count > 1:
            yield f"reward.scorers: {count} have the name {name}: give each its own"
    for scorer in reward.scorers:
        yield from _of_scorer(scorer)
    yield from _of_remotes(reward)
    best_of = settings.data.evaluation.best_of
    if best_of is not None and not serves_reward(settings):
        yield (
            "data.evaluation.best_of: the best is chosen by the run's reward, and this run has none: name reward.scorers, and "
            "among the phases reward_model where one of them is `trained`"
        )
    if best_of is not None and best_of > settings.generation.max_samples:
        yield (
            f"data.evaluation.best_of: {best_of} are over generation.max_samples = {settings.generation.max_samples}, the most "
            "that a request may sample: raise that, or lower this"
        )
    if reward.scorers and not any(scorer.weight for scorer in reward.scorers):
        yield "reward.scorers: every weight is 0, and so is every reward: give one of them another weight"
    truncate, longest = reward.truncate, settings.conductor.response_tokens
    if truncate is not None and truncate.not_before >= longest:
        yield (
            f"reward.truncate.not_before: position {truncate.not_before} is behind every response of at most "
            f"conductor.response_tokens = {longest}, which would all get missing_score: take a smaller one"
        )


def _of_scorer(scorer: ScorerSettings) -> Iterator[str]:
    from honed.kit.errors import InvalidArgument

    if scorer.options and scorer.kind == "reward_model":
        names = ", ".join(scorer.options)
        yield f"reward.scorers: {scorer.name} is a reward model, which has no options: remove {names}"
    if not scorer.source and scorer.kind != "ensemble":
        yield f"reward.scorers: {scorer.name} has no source, and a {scorer.kind.replace('_', ' ')} needs one"
    if scorer.kind == "ensemble" and scorer.source:
        yield f"reward.scorers: {scorer.name} is an ensemble: name {scorer.source} among its options.members"
    try:
        if scorer.kind == "ensemble":
            scorer.ensemble()
        if scorer.kind == "remote":
            scorer.remote()
    except InvalidArgument as error:
        yield str(error)


def _of_remotes(reward: RewardSettings) -> Iterator[str]:
    for scorer in (scorer for scorer in reward.scorers if scorer.kind == "remote"):
        if "://" in scorer.source.removeprefix("dns://") or not re.search(r":\d+$", scorer.source):
            yield f"reward.scorers: {scorer.name} has the source {scorer.source}: write host:port, without http"
        if scorer.source == reward.target and reward.port:
            yield f"reward.scorers: {scorer.name} asks {scorer.source}, which is this reward service itself"


def _of_reward_training(settings: RunSettings) -> Iterator[str]:
    section = settings.reward_training
    highest = max(section.read_layers, default=0)
    if section.layers is not None and section.layers < highest:
        yield f"reward_training.read_layers: layer {highest} is none of the first {section.layers} that `layers` keeps"
    without_meaning = dict.fromkeys(_OF_STEPS, "a head is solved for and takes no steps") if section.train == "head" else {}
    if section.train != "head":
        without_meaning["ridge"] = "take weight_decay"
    if section.train != "adapters":
        without_meaning |= dict.fromkeys(("adapter_rank", "adapter_alpha"), "there are no adapters")
    for name, reason in without_meaning.items():
        if getattr(section, name) != type(section).model_fields[name].default:
            yield f"reward_training.{name}: means nothing where train is {section.train}, {reason}: remove it"


def _of_generation(settings: RunSettings) -> Iterator[str]:
    from honed.generation.gate import training_floor, window_of

    section = settings.generation
    window = window_of(section.max_num_seqs)
    floor = training_floor(window, section.application_share, section.rollout_concurrency)
    if section.max_queued - floor < section.max_samples:
        yield (
            f"generation.max_queued: {section.max_queued} leave applications room for {max(0, section.max_queued - floor)} "
            f"samples beside the {floor} of training (application_share, max_num_seqs, rollout_concurrency), and a request may "
            f"ask for max_samples = {section.max_samples}: take at least {floor + section.max_samples}, or fewer max_samples"
        )


def _of_conductor(settings: RunSettings) -> Iterator[str]:
    devices = {name: getattr(settings, name).device for name in ("learner", "sft", "reward_training")}
    for name, device in devices.items():
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            yield f"{name}.device: {device!r} is no device: take auto, cpu, cuda, or cuda:N"
    mix = settings.conductor.prompt_mix
    if not (mix.file or mix.submitted or mix.application):
        yield "conductor.prompt_mix: every weight is 0, so nothing would be trained on: give a source another weight"
    if settings.conductor.start_from is None:
        pretrain = settings.pretrain
        if pretrain.hidden_size % pretrain.head_size:
            yield (
                f"pretrain.hidden_size: {pretrain.hidden_size} is no multiple of pretrain.head_size = {pretrain.head_size}: "
                "change one of them"
            )
        unfrozen = settings.learner.unfrozen_layers
        if unfrozen is not None and unfrozen > pretrain.layers:
            yield f"learner.unfrozen_layers: {unfrozen}, and pretrain.layers makes {pretrain.layers}: take fewer, or null"
