"""Which source a run's algorithm learns from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from honed.config import RunSettings
from honed.learner.algorithms.base import find_algorithm, make_algorithm
from honed.learner.data.episode import Vocabulary
from honed.learner.sources.preferences import PreferenceExamples
from honed.learner.sources.recorded import Reading, RecordedJudgements, as_labelled, as_pairs
from honed.learner.sources.scored_stream import Intake, IntakeSettings
from honed.learner.sources.snapshot_keys import SnapshotKeys
from honed.learner.sources.trained import TrainedIds
from honed.models.tokenizer import load_tokenizer
from honed.queue.holding import holding
from honed.queue.stream import WorkQueue
from honed.runtime import internal_channel
from honed.workspace import Workspace


@asynccontextmanager
async def opened(
    settings: RunSettings, queue: WorkQueue, base: Path, vocabulary: Vocabulary, promoted: Callable[[], Mapping[str, str]]
) -> AsyncIterator[Intake | PreferenceExamples[Any]]:
    """The source of the run; it ends with the block.

    Args:
        settings: The run's.
        queue: The learner's consumer of the stage `scored`.
        base: Directory of the base model.
        vocabulary: Of the policy.
        promoted: The version of each scorer whose scores are trained on.
    """
    section = settings.learner
    learns_from = find_algorithm(section.algorithm).learns_from
    if learns_from == "rollouts":
        async with holding(queue) as leases:
            intake = Intake(queue, leases, vocabulary, intake_settings(settings), TrainedIds(settings.run), promoted)
            try:
                yield intake
            finally:
                await intake.close()
        return
    reading: Callable[..., Reading[Any]] = as_pairs if learns_from == "preferences" else as_labelled
    async with internal_channel(settings, settings.preference.target) as channel:
        made = reading(load_tokenizer(base), section.preferences, longest=settings.generation.max_model_tokens)
        judgements = RecordedJudgements(channel, made)
        keys = SnapshotKeys(Workspace(settings.directory).learner / "snapshot-keys", settings.run)
        refresh = section.preferences.refresh
        yield PreferenceExamples(settings.run, judgements, keys, seed=settings.seed, refresh=refresh)


def intake_settings(settings: RunSettings) -> IntakeSettings:
    """What the intake lets in."""
    section = settings.learner
    return IntakeSettings(
        section.max_staleness,
        settings.generation.max_model_tokens,
        settings.reward.on_promotion,
        group=settings.conductor.samples_per_prompt if make_algorithm(section).needs.group > 1 else 1,
        group_timeout_s=section.group_timeout_s,
    )
