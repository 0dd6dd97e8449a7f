"""Promotions of reward models in all replicas at once.

A promotion is one write of the record in the store (`honed.artifacts.promotions`), made under a lease.
It is then announced through Redis; each replica watches, loads what it lacks, and serves it from its
next batch on. A replica that starts reads the record before it is ready. So whatever dies in between,
the replicas come to serve what the record says, and no replica decides by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from honed.artifacts.promotions import Promoted, PromotionAnswer, PromotionRecord, PromotionState
from honed.artifacts.reward_models import TRAINED, ArtifactRef
from honed.kit.errors import Conflict, HonedError, NotFound
from honed.kit.idempotency import Once
from honed.queue.members import Member
from honed.queue.promotions import Announced, Candidate
from honed.reward.registry import BuildScorer, LoadedScorer, ScorerRegistry
from honed.reward.replicas import Replicas, agreement
from honed.reward.reward import Truncation
from honed.reward.settings import ScorerSettings
from honed.reward.sources import ModelSources

logger = logging.getLogger(__name__)

WATCH_S: Final = 0.5
_READ_S: Final = 10.0  # how often the record is read though nothing was announced: an announcement may be lost
_RETRY_S: Final = 5.0  # a model that could not be loaded is tried again after so long
_LOG_S: Final = 30.0


class Promoter:
    """Keeps one replica's registry in step with the record. Belongs to one event loop."""

    def __init__(
        self,
        registry: ScorerRegistry,
        sources: ModelSources,
        record: PromotionRecord,
        replicas: Replicas,
        *,
        load_timeout_s: float = 300.0,
        promote_timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Does nothing until `start`.

        Args:
            registry: The scorers of this process.
            sources: Where reward models come from.
            record: The run's.
            replicas: The other processes.
            load_timeout_s: How long all replicas may take to load a version.
            promote_timeout_s: How long all replicas may take to serve it.
            clock: Seconds, monotonic.
            sleep: How to wait.
        """
        self._registry, self._sources, self._record, self._replicas = registry, sources, record, replicas
        self._load_timeout_s, self._promote_timeout_s = load_timeout_s, promote_timeout_s
        self._clock, self._sleep = clock, sleep
        self._number = 0
        self._read_due = clock()
        self._failed: dict[str, tuple[str, str, float]] = {}  # scorer to version, reason, when to try again
        self._unrecorded: tuple[ScorerSettings, ...] = ()
        self._changing = asyncio.Lock()
        self._load_once: Once[LoadedScorer] = Once()

    async def start(self, build: BuildScorer, truncation: Truncation | None = None) -> None:
        """Loads and serves what is promoted; without a promotion what the settings name. `catch_up` comes next.

        Waits for the run's own reward model where a scorer's source is `trained` and there is none yet.

        Raises:
            HonedError: A scorer cannot be loaded; says why.
        """
        state = await asyncio.to_thread(self._record.read)
        chosen = {settings.name: await self._at_start(settings, state) for settings in self._registry.settings}
        await self._registry.start(build, chosen, truncation)
        self._number = state.number
        # So that all replicas, and this one after a restart, serve the same version though a newer one has been trained.
        self._unrecorded = tuple(s for s in self._registry.settings if s.source == TRAINED and _promoted(s, state) is None)

    def facts(self) -> dict[str, str]:
        """What the other replicas want to know of this one."""
        facts = {"promotions": str(self._number)}
        for loaded in self._registry.scorers():
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
            if any(s.name == candidate.name and s.kind == "reward_model" for s in self._registry.settings):
                await self._take(candidate.name, candidate.source, candidate.version)

    async def load(self, name: str, source: str, key: str = "") -> LoadedScorer:
        """Loads a version beside the serving one in every replica; answers when all have it.

        Args:
            name: A scorer of the settings.
            source: `artifact:NAME/VERSION`, or a model directory, which becomes an artifact under the scorer's name.
            key: The same key again returns the first answer.

        Raises:
            NotFound: No such scorer, or no such artifact.
            PermissionDenied: The directory is outside the allowed roots.
            FailedPrecondition: The scorer is a function, the model is of a kind that cannot serve, or a replica cannot load it.
            DataLoss: The model is missing, incomplete or damaged.
            DeadlineExceeded: A replica has not loaded it in time; names it.
        """
        return await self._load_once(key, lambda: self._load(name, source))

    async def promote(self, name: str, version: str, key: str = "") -> tuple[LoadedScorer, str, int]:
        """Makes a loaded version serve in every replica, from the next batch on, and over restarts.

        Returns:
            What serves now, the version that served before, and how many replicas serve it.

        Raises:
            NotFound: No such scorer, or no replica has loaded the version.
            Conflict: The key belongs to the promotion of something else.
            Unavailable: The promotion cannot be recorded; the old version serves.
            DeadlineExceeded: It is recorded, and a replica does not serve it yet; names it.
        """
        loaded = await self._in_memory(name, version)
        async with self._replicas.alone():
            state = await asyncio.to_thread(self._record.read)
            answer = state.answers.get(key) if key else None
            if answer is None:
                settings = self._registry.model_settings(name)
                standing = _promoted(settings, state)
                previous = standing.version if standing is not None else self._registry.serving_version(name)
                answer = PromotionAnswer(name, version, previous)
                state = state.with_promotion(name, Promoted(loaded.source, version, settings.source))
                state = state.with_answer(key, answer) if key else state
                await asyncio.to_thread(self._record.write, state)
            elif (answer.name, answer.version) != (name, version):
                raise Conflict(f"this idempotency key promoted '{answer.name}' {answer.version}; take another key")
            await self._announce(state)
            await self._apply(state)
        others = await self._agreement(
            lambda member: _number(member) >= state.number,
            (name, version),
            self._promote_timeout_s,
            f"{name} {version} is promoted, but not yet served by",
        )
        serving = sum(member.facts.get(f"scorer:{name}") == version for member in others)
        here = self._registry.find(name, version)
        return here or loaded, answer.previous, serving + int(self._registry.serving_version(name) == version)

    async def _load(self, name: str, source: str) -> LoadedScorer:
        self._registry.model_settings(name)
        if ArtifactRef.parse(source) is None:
            directory = await asyncio.to_thread(self._sources.directory, source)
            async with self._replicas.alone():
                loaded = await self._registry.load(name, str(directory))  # first, so that only what can serve is published
                version = loaded.scorer.version
                state = await asyncio.to_thread(self._record.read)
                kept = [promoted.source for promoted in state.by_scorer.values()]
                reference = await asyncio.to_thread(self._sources.publish, name, directory, version, kept)
            loaded = self._registry.rename(name, version, str(reference))
        else:
            loaded = await self._registry.load(name, source)
        version = loaded.scorer.version
        await self._replicas.offer(Candidate(name, version, loaded.source))
        await self._agreement(
            lambda member: version in member.facts.get(f"loaded:{name}", "").split(),
            (name, version),
            self._load_timeout_s,
            f"{name} {version} is not loaded by",
        )
        return loaded

    async def _in_memory(self, name: str, version: str) -> LoadedScorer:
        """A version that some replica has loaded, in this one's memory."""
        found = self._registry.find(name, version)
        if found is not None:
            return found
        for candidate in (await self._replicas.announced()).candidates:
            if (candidate.name, candidate.version) == (name, version):
                return await self._registry.load(name, candidate.source, version)
        raise NotFound(f"scorer '{name}' has no version {version} in memory; load it first")

    async def _at_start(self, settings: ScorerSettings, state: PromotionState) -> tuple[str, str | None]:
        promoted = _promoted(settings, state)
        if promoted is not None:
            return promoted.source, promoted.version
        if settings.name in state.by_scorer:
            logger.warning("the run file names a new source: the promotion is void", extra={"scorer": settings.name})
        if settings.source != TRAINED:
            return settings.source, None
        log_due = self._clock()
        while True:
            newest = await asyncio.to_thread(self._sources.newest, TRAINED)
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
            return await self._replicas.announced()
        except HonedError as error:
            logger.warning("other replicas cannot be heard; Redis does not answer", extra={"reason": str(error)})
            return None

    async def _follow_record(self, announced: Announced | None) -> None:
        heard = announced.number if announced is not None else self._number
        if heard == self._number and self._clock() < self._read_due:
            return
        state = await asyncio.to_thread(self._record.read)
        self._read_due = self._clock() + _READ_S
        if announced is not None and heard < state.number:
            await self._announce(state)
        await self._apply(state)

    async def _apply(self, state: PromotionState) -> None:
        """Serves what `state` says; a scorer whose model cannot be loaded goes on with the old one."""
        async with self._changing:  # a newer state that came meanwhile stands
            if state.number >= self._number:
                await self._serve(state)

    async def _serve(self, state: PromotionState) -> None:
        complete = True
        for settings in self._registry.settings:
            promoted = _promoted(settings, state)
            if promoted is None or promoted.version == self._registry.serving_version(settings.name):
                continue
            if await self._take(settings.name, promoted.source, promoted.version):
                self._registry.serve(settings.name, promoted.version)
            else:
                complete = False
        if complete:
            self._number = state.number
        else:
            self._read_due = self._clock()  # not at rest: the next round tries again

    async def _take(self, name: str, source: str, version: str) -> bool:
        """Loads a version unless it is in memory; False if that fails, or has failed a moment ago."""
        if self._registry.find(name, version) is not None:
            return True
        failed = self._failed.get(name)
        if failed is not None and failed[0] == version and self._clock() < failed[2]:
            return False
        try:
            await self._registry.load(name, source, version)
        except (HonedError, OSError) as error:
            self._failed[name] = (version, str(error), self._clock() + _RETRY_S)
            logger.warning("version cannot be loaded", extra={"scorer": name, "version": version, "reason": str(error)})
            return False
        self._failed.pop(name, None)
        return True

    async def _record_choice(self) -> None:
        """Records which `trained` version serves, unless another replica was faster: then that one serves here too."""
        async with self._replicas.alone():
            state = await asyncio.to_thread(self._record.read)
            for settings in self._unrecorded:
                if _promoted(settings, state) is None:
                    version = self._registry.serving_version(settings.name)
                    loaded = self._registry.find(settings.name, version)
                    assert loaded is not None, "what serves is in memory"
                    state = state.with_promotion(settings.name, Promoted(loaded.source, version, TRAINED))
                    await asyncio.to_thread(self._record.write, state)
        self._unrecorded = ()
        await self._announce(state)
        await self._apply(state)

    async def _announce(self, state: PromotionState) -> None:
        try:
            await self._replicas.announce(state)
        except HonedError as error:  # the others read the record now and then
            logger.warning("promotion cannot be announced", extra={"reason": str(error)})

    def _agreement(
        self, done: Callable[[Member], bool], wanted: tuple[str, str], timeout_s: float, what: str
    ) -> Awaitable[list[Member]]:
        return agreement(self._replicas, done, wanted, timeout_s, what, clock=self._clock, sleep=self._sleep)


def _promoted(settings: ScorerSettings, state: PromotionState) -> Promoted | None:
    """What stands in for the settings' source; None if the run file names a new source since."""
    promoted = state.by_scorer.get(settings.name)
    return promoted if promoted is not None and promoted.instead_of == settings.source else None


def _number(member: Member) -> int:
    return int(member.facts.get("promotions", "0"))
