"""Keeps one replica's scorers in step with the record of promotions.

The record in the store (`honed.artifacts.promotions`) is the truth. What is written there is announced through Redis; each
replica watches, loads what it lacks, and serves it from its next batch on. A replica that starts reads the record before it
is ready. So whatever dies in between, the replicas come to serve what the record says, and no replica decides by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from honed.artifacts.promotions import Promoted, PromotionRecord, PromotionState
from honed.artifacts.reward_models import TRAINED
from honed.kit.errors import HonedError
from honed.queue.promotions import Announced
from honed.reward.registry import BuildScorer, ScorerRegistry
from honed.reward.replicas import Replicas
from honed.reward.reward import Truncation
from honed.reward.settings import ScorerSettings
from honed.reward.sources import ModelSources

logger = logging.getLogger(__name__)

WATCH_S: Final = 0.5
_READ_S: Final = 10.0  # how often the record is read though nothing was announced: an announcement may be lost
_RETRY_S: Final = 5.0  # a model that could not be loaded is tried again after so long
_LOG_S: Final = 30.0


class RecordFollower:
    """Keeps one replica's registry in step with the record. Belongs to one event loop.

    Attributes:
        registry: The scorers of this process.
        sources: Where reward models come from.
        record: The run's.
        replicas: The other processes.
    """

    def __init__(
        self,
        registry: ScorerRegistry,
        sources: ModelSources,
        record: PromotionRecord,
        replicas: Replicas,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Does nothing until `start`. `clock` gives seconds, monotonic; `sleep` waits."""
        self.registry, self.sources, self.record, self.replicas = registry, sources, record, replicas
        self._clock, self._sleep = clock, sleep
        self._number = 0
        self._read_due = clock()
        self._failed: dict[str, tuple[str, str, float]] = {}  # scorer to version, reason, when to try again
        self._unrecorded: tuple[ScorerSettings, ...] = ()
        self._changing = asyncio.Lock()

    async def start(self, build: BuildScorer, truncation: Truncation | None = None) -> None:
        """Loads and serves what is promoted; without a promotion what the settings name. `catch_up` comes next.

        Waits for the run's own reward model where a scorer's source is `trained` and there is none yet.

        Raises:
            HonedError: A scorer cannot be loaded; says why.
        """
        state = await asyncio.to_thread(self.record.read)
        chosen = {settings.name: await self._at_start(settings, state) for settings in self.registry.settings}
        await self.registry.start(build, chosen, truncation)
        self._number = state.number
        # So that all replicas, and this one after a restart, serve the same version though a newer one has been trained.
        self._unrecorded = tuple(s for s in self.registry.settings if s.source == TRAINED and promoted_source(s, state) is None)

    def facts(self) -> dict[str, str]:
        """What the other replicas want to know of this one."""
        facts = {"promotions": str(self._number)}
        for loaded in self.registry.scorers():
            name, version = loaded.scorer.name, loaded.scorer.version
            facts[f"loaded:{name}"] = f"{facts.get(f'loaded:{name}', '')} {version}".strip()
            if loaded.serving:
                facts[f"scorer:{name}"] = version
        return facts | {f"failed:{name}": f"{version} {reason}" for name, (version, reason, _) in self._failed.items()}

    async def watch(self, changed: Callable[[], None]) -> None:
        """Follows the record until cancelled; calls `changed` when the facts have changed."""
        told = self.facts()
        while True:
            await self.catch_up()
            if (facts := self.facts()) != told:  # also what a call has changed here meanwhile
                told = facts
                changed()
            await self._sleep(WATCH_S)

    async def catch_up(self) -> None:
        """Brings this replica to where the record is. What fails is logged, shown in the facts, and tried again."""
        announced = await self._announced()
        try:
            await self._follow_record(announced)
            if self._unrecorded:
                await self._record_choice()
        except (HonedError, OSError) as error:
            logger.warning("promotions cannot be followed; what serves goes on", extra={"reason": str(error)})
        for candidate in announced.candidates if announced is not None else ():
            if any(s.name == candidate.name and s.kind == "reward_model" for s in self.registry.settings):
                await self._take(candidate.name, candidate.source, candidate.version)

    async def _at_start(self, settings: ScorerSettings, state: PromotionState) -> tuple[str, str | None]:
        promoted = promoted_source(settings, state)
        if promoted is not None:
            return promoted.source, promoted.version
        if settings.name in state.by_scorer:
            logger.warning("the run file names a new source: the promotion is void", extra={"scorer": settings.name})
        if settings.source != TRAINED:
            return settings.source, None
        log_due = self._clock()
        while True:
            newest = await asyncio.to_thread(self.sources.newest, TRAINED)
            if newest is not None:
                return str(newest), None
            if self._clock() >= log_due:
                logger.warning(
                    "not ready: the run has no reward model yet; its reward-model phase makes one",
                    extra={"scorer": settings.name},
                )
                log_due += _LOG_S
            await self._sleep(1.0)

    async def _announced(self) -> Announced | None:
        try:
            return await self.replicas.announced()
        except HonedError as error:
            logger.warning("other replicas cannot be heard; Redis does not answer", extra={"reason": str(error)})
            return None

    async def _follow_record(self, announced: Announced | None) -> None:
        heard = announced.number if announced is not None else self._number
        if heard == self._number and self._clock() < self._read_due:
            return
        state = await asyncio.to_thread(self.record.read)
        self._read_due = self._clock() + _READ_S
        if announced is not None and heard < state.number:
            await self.announce(state)
        await self.apply(state)

    async def apply(self, state: PromotionState) -> None:
        """Serves what `state` says; a scorer whose model cannot be loaded goes on with the old one."""
        async with self._changing:  # a newer state that came meanwhile stands
            if state.number >= self._number:
                await self._serve(state)

    async def _serve(self, state: PromotionState) -> None:
        complete = True
        for settings in self.registry.settings:
            promoted = promoted_source(settings, state)
            if promoted is None or promoted.version == self.registry.serving_version(settings.name):
                continue
            if await self._take(settings.name, promoted.source, promoted.version):
                self.registry.serve(settings.name, promoted.version)
            else:
                complete = False
        if complete:
            self._number = state.number
        else:
            self._read_due = self._clock()  # not at rest: the next round tries again

    async def _take(self, name: str, source: str, version: str) -> bool:
        """Loads a version unless it is in memory; False if that fails, or has failed a moment ago."""
        if self.registry.find(name, version) is not None:
            return True
        failed = self._failed.get(name)
        if failed is not None and failed[0] == version and self._clock() < failed[2]:
            return False
        try:
            await self.registry.load(name, source, version)
        except (HonedError, OSError) as error:
            self._failed[name] = (version, str(error), self._clock() + _RETRY_S)
            logger.warning("version cannot be loaded", extra={"scorer": name, "version": version, "reason": str(error)})
            return False
        self._failed.pop(name, None)
        return True

    async def _record_choice(self) -> None:
        """Records which `trained` version serves, unless another replica was faster: then that one serves here too."""
        async with self.replicas.alone():
            state = await asyncio.to_thread(self.record.read)
            for settings in self._unrecorded:
                if promoted_source(settings, state) is None:
                    version = self.registry.serving_version(settings.name)
                    loaded = self.registry.find(settings.name, version)
                    assert loaded is not None, "what serves is in memory"
                    state = state.with_promotion(settings.name, Promoted(loaded.source, version, TRAINED))
                    await asyncio.to_thread(self.record.write, state)
        self._unrecorded = ()
        await self.announce(state)
        await self.apply(state)

    async def announce(self, state: PromotionState) -> None:
        """Tells the other replicas of a state; without Redis they find it in the record."""
        try:
            await self.replicas.announce(state)
        except HonedError as error:  # the others read the record now and then
            logger.warning("promotion cannot be announced", extra={"reason": str(error)})


def promoted_source(settings: ScorerSettings, state: PromotionState) -> Promoted | None:
    """What stands in for the settings' source; None if the run file names a new source since."""
    promoted = state.by_scorer.get(settings.name)
    return promoted if promoted is not None and promoted.instead_of == settings.source else None
