"""What a separate critic starts from: the run's reward model, or the policy's base.

It is chosen once for a run and kept in the learner's directory (`critic.json`, and a copy in `critic/`). A checkpoint holds the
critic's weights and not its shape, so a learner that resumes must build the same model, whatever became of the reward model.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from honed.artifacts.reward_models import TRAINED, ArtifactRef, RewardModelStore
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, HonedError, NotFound
from honed.learner.jobs.home import appearing
from honed.learner.models.critic import ValueModel
from honed.models.attention import Precision
from honed.models.facts import ModelFacts, read_json
from honed.models.tokenizer import tokenizer_digest

logger = logging.getLogger(__name__)

_RECORD: Final = "critic.json"
_COPY: Final = "critic"
_BASE: Final = "base"


@dataclass(frozen=True)
class CriticStart:
    """A model directory to begin from, and whether it is a reward model or a language model."""

    directory: Path
    is_reward_model: bool

    def load(self, device: torch.device, precision: Precision) -> ValueModel:
        """The critic as it is before the first update.

        Raises:
            DataLoss: The directory is damaged.
        """
        make = ValueModel.from_reward_model if self.is_reward_model else ValueModel.from_language_model
        return make(self.directory, device=device, precision=precision)


def choose_critic_start(settings: RunSettings, base: Path, home: Path) -> CriticStart:
    """What the run's critic starts from, by the record in `home`; the first time it is chosen and recorded. Blocks.

    It is the first scorer that is a reward model which can be read here, reads the policy's tokens by the same tokenizer and
    texts as long as the generator's; without one, the base.

    Raises:
        DataLoss: The record is damaged, or the copy that it speaks of.
    """
    copy, record = home / _COPY, home / _RECORD
    if record.is_file():
        return _recorded(read_json(record), base, copy)
    started, reasons = _BASE, list[str]()
    for source in [scorer.source for scorer in settings.reward.scorers if scorer.kind == "reward_model"]:
        try:
            started = _copied(settings, source, base, copy)
            break
        except (HonedError, OSError) as error:
            reasons.append(f"{source}: {error}")
    partial = record.with_name(f"{_RECORD}.partial")
    partial.write_text(json.dumps({"from": started, "passed_over": reasons}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, record)
    logger.info("the critic starts from a model of its own", extra={"start": started, "passed_over": reasons})
    return _recorded({"from": started}, base, copy)


def _recorded(record: dict[str, object], base: Path, copy: Path) -> CriticStart:
    return CriticStart(base, is_reward_model=False) if record.get("from") == _BASE else CriticStart(copy, is_reward_model=True)


def _copied(settings: RunSettings, source: str, base: Path, copy: Path) -> str:
    """Copies the reward model of a scorer's source; returns what it is called.

    Raises:
        HonedError: It cannot be had, or the critic of this policy cannot be made of it.
    """
    ref = ArtifactRef.parse(source)
    if source == TRAINED:
        newest = RewardModelStore(settings.policy_url, settings.run, TRAINED).latest()
        if newest is None:
            raise NotFound("the run has trained no reward model yet")
        ref = ArtifactRef(TRAINED, newest)
    shutil.rmtree(copy, ignore_errors=True)  # of a start that was cut short
    with appearing(copy) as partial:
        if ref is None:
            shutil.copytree(Path(source), partial)
        else:
            fetched = RewardModelStore(settings.policy_url, settings.run, ref.name).fetch(
                ref.version, partial.parent / "fetched"
            )
            os.replace(fetched, partial)
        _check(partial, base, settings.generation.max_model_tokens)
    return source if ref is None else str(ref)


def _check(directory: Path, base: Path, tokens: int) -> None:
    """Refuses a reward model that could not value what the policy samples.

    Raises:
        HonedError: It could not.
    """
    if tokenizer_digest(directory) != tokenizer_digest(base):
        raise FailedPrecondition("it has another tokenizer than the policy")
    facts, policy = ModelFacts.read(directory), ModelFacts.read(base)
    if (facts.vocabulary_size or 0) < (policy.vocabulary_size or 0):
        raise FailedPrecondition(f"it knows {facts.vocabulary_size} token ids, and the policy {policy.vocabulary_size}")
    facts.check_length(tokens)
    CriticStart(directory, is_reward_model=True).load(torch.device("cpu"), "float32")
