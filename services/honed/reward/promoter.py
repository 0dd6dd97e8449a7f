"""Promotions of reward models in all replicas at once.

A promotion is one write of the record in the store, made under a lease. Every replica then comes to serve it by itself
(`follower`); the caller is answered when all that are there have it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from honed.artifacts.promotions import Promoted, PromotionAnswer
from honed.artifacts.reward_models import ArtifactRef
from honed.kit.errors import Conflict, NotFound
from honed.kit.idempotency import Once
from honed.queue.members import Member
from honed.queue.promotions import Candidate
from honed.reward.follower import RecordFollower, promoted_source
from honed.reward.registry import LoadedScorer
from honed.reward.replicas import agreement


class Promoter:
    """Loads and promotes reward models for the callers of one replica. Belongs to one event loop."""

    def __init__(
        self,
        follower: RecordFollower,
        *,
        load_timeout_s: float = 300.0,
        promote_timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Does nothing yet.

        Args:
            follower: Keeps this replica in step.
            load_timeout_s: How long all replicas may take to load a version.
            promote_timeout_s: How long all replicas may take to serve it.
            clock: Seconds, monotonic.
            sleep: How to wait.
        """
        self._follower = follower
        self._registry, self._sources = follower.registry, follower.sources
        self._record, self._replicas = follower.record, follower.replicas
        self._load_timeout_s, self._promote_timeout_s = load_timeout_s, promote_timeout_s
        self._clock, self._sleep = clock, sleep
        self._load_once: Once[LoadedScorer] = Once()

    async def load(self, name: str, source: str, key: str = "") -> LoadedScorer:
        """Loads a version beside the serving one in every replica; answers when all have it.

        Args:
            name: A scorer of the settings.
            source: `artifact:NAME/VERSION`, or a model directory, which becomes an artifact under the scorer's name.
            key: The same key again returns the first answer.

        Raises:
            NotFound: No such scorer, or no such artifact.
            PermissionDenied: The directory is outside the allowed roots.
            FailedPrecondition: The scorer is no reward model, the model cannot serve, or a replica cannot load it.
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
                standing = promoted_source(settings, state)
                previous = standing.version if standing is not None else self._registry.serving_version(name)
                answer = PromotionAnswer(name, version, previous)
                state = state.with_promotion(name, Promoted(loaded.source, version, settings.source))
                state = state.with_answer(key, answer) if key else state
                await asyncio.to_thread(self._record.write, state)
            elif (answer.name, answer.version) != (name, version):
                raise Conflict(f"this idempotency key promoted '{answer.name}' {answer.version}; take another key")
            await self._follower.announce(state)
            await self._follower.apply(state)
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
                kept += [source for settings in self._registry.settings for _, source in settings.models]
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

    def _agreement(
        self, done: Callable[[Member], bool], wanted: tuple[str, str], timeout_s: float, what: str
    ) -> Awaitable[list[Member]]:
        return agreement(self._replicas, done, wanted, timeout_s, what, clock=self._clock, sleep=self._sleep)


def _number(member: Member) -> int:
    return int(member.facts.get("promotions", "0"))
