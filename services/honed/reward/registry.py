"""Which scorers are loaded, and which of them serve.

Loading puts a version beside the one that serves. Promotion records it durably and then replaces the immutable `WeightedSum` by
another one in a single assignment; a batch holds the sum that it started with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from honed.config import ScorerSettings
from honed.kit.errors import Conflict, DataLoss, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unavailable
from honed.kit.idempotency import Once
from honed.reward import metrics
from honed.reward.promotions import Promoted, PromotionAnswer, Promotions
from honed.reward.reward import Term, Truncation, WeightedSum
from honed.reward.scorer import Scorer

logger = logging.getLogger(__name__)

_KEPT_BESIDE: Final = 2  # versions of one scorer that stay in memory without serving: the next, and the last

BuildScorer = Callable[[ScorerSettings, str], Scorer]
"""Makes the scorer of some settings from a source. Blocks."""


@dataclass(frozen=True, slots=True)
class LoadedScorer:
    """One version in memory."""

    scorer: Scorer
    weight: float
    serving: bool


@dataclass(slots=True)
class _Slot:
    """One scorer of the settings: its versions by the order of their load, with the source of each."""

    settings: ScorerSettings
    serving: Scorer
    loaded: dict[str, tuple[Scorer, str]] = field(default_factory=dict)

    def describe(self, scorer: Scorer) -> LoadedScorer:
        return LoadedScorer(scorer, self.settings.weight, scorer.version == self.serving.version)

    def add(self, scorer: Scorer, source: str) -> None:
        self.loaded[scorer.version] = (scorer, source)
        beside = [version for version in self.loaded if version not in (self.serving.version, scorer.version)]
        for version in beside[: max(0, len(beside) + 1 - _KEPT_BESIDE)]:
            del self.loaded[version]


class ScorerRegistry:
    """The scorers of one service. Belongs to one event loop."""

    def __init__(
        self,
        settings: Sequence[ScorerSettings],
        build: BuildScorer,
        record: Path,
        roots: Sequence[Path],
        truncation: Truncation | None = None,
    ) -> None:
        """Loads nothing until `start`.

        Args:
            settings: The terms of the reward.
            build: Makes a scorer.
            record: The file that remembers promotions.
            roots: Directories that `load` may load from.
            truncation: Cuts the scored text; None leaves it whole.
        """
        self._settings = tuple(settings)
        self._build = build
        self._record = record
        self._roots = tuple(root.resolve() for root in roots)
        self._truncation = truncation
        self._slots: dict[str, _Slot] = {}
        self._serving: WeightedSum | None = None
        self._promotions = Promotions()
        self._changing = asyncio.Lock()
        self._load_once: Once[LoadedScorer] = Once()

    @property
    def serving(self) -> WeightedSum:
        """The reward as it is now.

        Raises:
            Unavailable: Before `start`.
        """
        if self._serving is None:
            raise Unavailable("the scorers are still being loaded; try again soon")
        return self._serving

    async def start(self) -> None:
        """Loads what the settings name, or what was promoted in its place.

        Raises:
            InvalidArgument: No scorer is named, or two have one name.
            DataLoss: A promoted model is gone or changed, or a model directory is damaged.
            HonedError: A scorer cannot be loaded; says why.
        """
        self._promotions = await asyncio.to_thread(Promotions.read, self._record)
        for settings in self._settings:
            source, version = self._source_at_start(settings)
            scorer = await asyncio.to_thread(self._build, settings, source)
            if version is not None and scorer.version != version:
                raise DataLoss(
                    f"scorer '{settings.name}': {source} was promoted as version {version} and is {scorer.version} now; "
                    f"restore the directory, or remove {self._record} to serve the sources of the run file"
                )
            self._slots[settings.name] = _Slot(settings, scorer, {scorer.version: (scorer, source)})
        self._serving = self._sum({})

    def scorers(self) -> list[LoadedScorer]:
        """Everything in memory, ordered by name, then version."""
        return [
            slot.describe(slot.loaded[version][0]) for _, slot in sorted(self._slots.items()) for version in sorted(slot.loaded)
        ]

    async def load(self, name: str, source: str, key: str = "") -> LoadedScorer:
        """Loads a version beside the serving one, which goes on.

        Args:
            name: A scorer of the settings.
            source: The model directory.
            key: The same key again returns the first answer.

        Raises:
            NotFound: No such scorer.
            PermissionDenied: The directory is outside the allowed roots.
            FailedPrecondition: The scorer is a function, or the model is of a kind that cannot serve.
            DataLoss: The directory is missing, incomplete or damaged.
        """
        return await self._load_once(key, lambda: self._load(name, source))

    async def promote(self, name: str, version: str, key: str = "") -> tuple[LoadedScorer, str]:
        """Makes a loaded version serve, from the next batch on, and over restarts.

        Returns:
            What serves now, and the version that served before.

        Raises:
            NotFound: No such scorer, or the version is not loaded.
            Conflict: The key belongs to the promotion of something else.
            Unavailable: The promotion cannot be recorded; the old version serves.
        """
        async with self._changing:
            slot = self._slot(name)
            answered = self._promotions.answers.get(key) if key else None
            if answered is not None:
                if (answered.name, answered.version) != (name, version):
                    raise Conflict(f"this idempotency key promoted '{answered.name}' {answered.version}; take another key")
                return self._described(slot, version), answered.previous
            scorer, source = self._loaded(slot, version)
            previous = slot.serving.version
            state = self._promotions.with_promotion(name, Promoted(source, version, slot.settings.source))
            if key:
                state = state.with_answer(key, PromotionAnswer(name, version, previous))
            await asyncio.to_thread(state.write, self._record)
            self._promotions = state
            self._serving, slot.serving = self._sum({name: scorer}), scorer
            metrics.PROMOTIONS.labels(name).inc()
            logger.info("promoted", extra={"scorer": name, "version": version, "previous": previous})
            return slot.describe(scorer), previous

    async def _load(self, name: str, source: str) -> LoadedScorer:
        slot = self._slot(name)
        if slot.settings.kind != "reward_model":
            raise FailedPrecondition(f"scorer '{name}' is a function; install its new version and restart the service")
        directory = self._allowed(source)
        async with self._changing:
            scorer = await asyncio.to_thread(self._build, slot.settings, str(directory))
            if scorer.version not in slot.loaded:
                slot.add(scorer, str(directory))
            logger.info("loaded", extra={"scorer": name, "version": scorer.version})
            return self._described(slot, scorer.version)

    def _allowed(self, source: str) -> Path:
        parts = urlsplit(source)
        if parts.scheme not in ("", "file"):
            raise InvalidArgument("source", f"{parts.scheme}:// cannot be read here; give a directory, or mount it as one")
        path = Path(parts.path if parts.scheme else source)
        directory = path.resolve()  # follows links and `..`, so that neither leads out of the roots
        if not any(directory.is_relative_to(root) for root in self._roots):
            raise PermissionDenied(f"{source} is outside the directories that reward.allowed_roots allows")
        return directory

    def _source_at_start(self, settings: ScorerSettings) -> tuple[str, str | None]:
        promoted = self._promotions.by_scorer.get(settings.name)
        if promoted is None:
            return settings.source, None
        if promoted.instead_of != settings.source:
            logger.warning("the run file names a new source: the promotion is void", extra={"scorer": settings.name})
            return settings.source, None
        return promoted.source, promoted.version

    def _slot(self, name: str) -> _Slot:
        if name not in self._slots:
            raise NotFound(f"no scorer '{name}'; the settings name {', '.join(sorted(self._slots)) or 'none'}")
        return self._slots[name]

    def _loaded(self, slot: _Slot, version: str) -> tuple[Scorer, str]:
        if version not in slot.loaded:
            raise NotFound(f"scorer '{slot.settings.name}' has no version {version} in memory; load it first")
        return slot.loaded[version]

    def _described(self, slot: _Slot, version: str) -> LoadedScorer:
        return slot.describe(self._loaded(slot, version)[0])

    def _sum(self, instead: dict[str, Scorer]) -> WeightedSum:
        terms = [
            Term(instead.get(settings.name, self._slots[settings.name].serving), settings.weight) for settings in self._settings
        ]
        return WeightedSum(terms, self._truncation)
