"""Which scorers are in memory, and which of them serve.

Loading puts a version beside the one that serves. Serving another version replaces the immutable
`WeightedSum` by another one in a single assignment; a batch holds the sum that it started with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from honed.kit.errors import DataLoss, FailedPrecondition, NotFound, Unavailable
from honed.reward import metrics
from honed.reward.reward import Term, Truncation, WeightedSum
from honed.reward.scorer import Scorer
from honed.reward.settings import ScorerSettings

logger = logging.getLogger(__name__)

_KEPT_BESIDE: Final = 2  # versions of one scorer that stay in memory without serving: the next, and the last

_CHANGED: Final = {
    "function": "a function; install its new version and restart the service",
    "ensemble": "an ensemble; name its new members in the run file and restart the service",
    "remote": "scored by another service; load and promote there",
}
"""How a new version of what is no reward model comes to serve."""

BuildScorer = Callable[[ScorerSettings, str], Scorer]
"""Makes the scorer of some settings from a source. Blocks."""


@dataclass(frozen=True, slots=True)
class LoadedScorer:
    """One version in memory."""

    scorer: Scorer
    weight: float
    serving: bool
    source: str


@dataclass(slots=True)
class _Slot:
    """One scorer of the settings: its versions by the order of their load, with the source of each."""

    settings: ScorerSettings
    serving: Scorer
    loaded: dict[str, tuple[Scorer, str]] = field(default_factory=dict)

    def describe(self, version: str) -> LoadedScorer:
        scorer, source = self.loaded[version]
        return LoadedScorer(scorer, self.settings.weight, version == self.serving.version, source)

    def add(self, scorer: Scorer, source: str) -> None:
        self.loaded[scorer.version] = (scorer, source)
        beside = [version for version in self.loaded if version not in (self.serving.version, scorer.version)]
        for version in beside[: max(0, len(beside) + 1 - _KEPT_BESIDE)]:
            del self.loaded[version]


class ScorerRegistry:
    """The scorers of one process. Belongs to one event loop."""

    def __init__(self, settings: Sequence[ScorerSettings]) -> None:
        """Loads nothing until `start`; `settings` are the terms of the reward."""
        self.settings = tuple(settings)
        self._slots: dict[str, _Slot] = {}
        self._build: BuildScorer | None = None
        self._truncation: Truncation | None = None
        self._serving: WeightedSum | None = None
        self._changing = asyncio.Lock()

    @property
    def serving(self) -> WeightedSum:
        """The reward as it is now.

        Raises:
            Unavailable: Before `start`.
        """
        if self._serving is None:
            raise Unavailable("the scorers are still being loaded; try again soon")
        return self._serving

    @property
    def started(self) -> bool:
        """Whether the scorers are loaded."""
        return self._serving is not None

    async def start(
        self, build: BuildScorer, sources: Mapping[str, tuple[str, str | None]], truncation: Truncation | None = None
    ) -> None:
        """Loads one version of each scorer, and serves it.

        Args:
            build: Makes a scorer.
            sources: For each scorer its source, and the version that must come of it if that is known.
            truncation: Cuts the scored text; None leaves it whole.

        Raises:
            InvalidArgument: No scorer is named, or two have one name.
            DataLoss: A source is gone, changed or damaged.
            HonedError: A scorer cannot be loaded; says why.
        """
        self._build, self._truncation = build, truncation
        for settings in self.settings:
            source, version = sources[settings.name]
            scorer = await asyncio.to_thread(build, settings, source)
            _check_version(settings.name, source, scorer, version)
            self._slots[settings.name] = _Slot(settings, scorer, {scorer.version: (scorer, source)})
        self._serving = self._sum({})

    def scorers(self) -> list[LoadedScorer]:
        """Everything in memory, ordered by name, then version."""
        return [slot.describe(version) for _, slot in sorted(self._slots.items()) for version in sorted(slot.loaded)]

    def find(self, name: str, version: str) -> LoadedScorer | None:
        """A version in memory.

        Raises:
            NotFound: No scorer has this name.
        """
        slot = self._slot(name)
        return slot.describe(version) if version in slot.loaded else None

    def serving_version(self, name: str) -> str:
        """Which version of a scorer serves.

        Raises:
            NotFound: No scorer has this name.
        """
        return self._slot(name).serving.version

    def model_settings(self, name: str) -> ScorerSettings:
        """The settings of a reward model.

        Raises:
            NotFound: No scorer has this name.
            FailedPrecondition: It is of another kind, whose versions change otherwise; says how.
        """
        settings = self._slot(name).settings
        if settings.kind != "reward_model":
            raise FailedPrecondition(f"scorer '{name}' is {_CHANGED[settings.kind]}")
        return settings

    async def load(self, name: str, source: str, version: str | None = None) -> LoadedScorer:
        """Loads a version beside the serving one, which goes on.

        Args:
            name: A reward model of the settings.
            source: `artifact:NAME/VERSION` or a model directory.
            version: The version that must come of it, if that is known.

        Raises:
            NotFound: No such scorer, or no such artifact.
            FailedPrecondition: The scorer is no reward model, or the model is of a kind that cannot serve.
            DataLoss: The model is missing, incomplete, damaged or another one.
        """
        settings = self.model_settings(name)
        assert self._build is not None, "a slot exists only after the start"
        async with self._changing:
            scorer = await asyncio.to_thread(self._build, settings, source)
            _check_version(name, source, scorer, version)
            slot = self._slots[name]
            if scorer.version in slot.loaded:
                slot.loaded[scorer.version] = (slot.loaded[scorer.version][0], source)
            else:
                slot.add(scorer, source)
            logger.info("loaded", extra={"scorer": name, "version": scorer.version, "source": source})
            return slot.describe(scorer.version)

    def rename(self, name: str, version: str, source: str) -> LoadedScorer:
        """Notes that a loaded version can be had from another source too, which is the one to name from now on."""
        slot = self._slot(name)
        slot.loaded[version] = (slot.loaded[version][0], source)
        return slot.describe(version)

    def serve(self, name: str, version: str) -> str:
        """Makes a loaded version serve, from the next batch on. Returns the version that served before.

        Raises:
            NotFound: No such scorer, or the version is not loaded.
        """
        slot = self._slot(name)
        if version not in slot.loaded:
            raise NotFound(f"scorer '{name}' has no version {version} in memory; load it first")
        scorer, previous = slot.loaded[version][0], slot.serving.version
        if previous != version:
            self._serving, slot.serving = self._sum({name: scorer}), scorer
            metrics.PROMOTIONS.labels(name).inc()
            logger.info("promoted", extra={"scorer": name, "version": version, "previous": previous})
        return previous

    def _slot(self, name: str) -> _Slot:
        if name not in self._slots:
            raise NotFound(f"no scorer '{name}'; the settings name {', '.join(sorted(self._slots)) or 'none'}")
        return self._slots[name]

    def _sum(self, instead: Mapping[str, Scorer]) -> WeightedSum:
        terms = [
            Term(instead.get(settings.name, self._slots[settings.name].serving), settings.weight) for settings in self.settings
        ]
        return WeightedSum(terms, self._truncation)


def _check_version(name: str, source: str, scorer: Scorer, version: str | None) -> None:
    if version is not None and scorer.version != version:
        raise DataLoss(
            f"scorer '{name}': {source} was promoted as version {version} and is {scorer.version} now; restore it, or remove "
            "reward/promoted.json from the run's store to serve the sources of the run file"
        )
