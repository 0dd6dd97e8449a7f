"""The change of weights as one transaction: prepare, freeze, load, verify by canaries, thaw; or roll back.

Invariants:

* The host thaws only with weights whose canaries have just passed.
* The version changes only after that, and back never happens silently: a failed commit raises Aborted.
* If the last good version cannot be restored, the host stays frozen for ever and `wait_dead` returns.
* A commit that has begun runs to its end even if its caller goes away.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from honed.artifacts.version import VersionId
from honed.generation.admission import Admission
from honed.generation.candidate import Candidate, check_fits, read_candidate
from honed.generation.engine import CommitReport, CommitSettings
from honed.kit.errors import Aborted, FailedPrecondition, Unavailable

T = TypeVar("T")


class WeightHost(Protocol):
    """What a transaction needs of an engine. Deadlines are the transaction's business."""

    async def freeze(self) -> None:
        """Stops sampling and keeps every request. Also while it is frozen already."""

    async def load(self, candidate: Candidate) -> None:
        """Replaces all weights, labels what they will sample, and forgets all that the old ones had computed."""

    async def canary_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each prompt the log-probabilities of its tokens but the first. Nothing else may be sampled meanwhile."""

    async def thaw(self) -> None:
        """Lets every request go on."""

    async def halt(self, reason: str) -> None:
        """Fails every request; nothing may leave the engine any more."""


class VersionSwap:
    """Which version serves, and how another one takes its place."""

    def __init__(
        self,
        host: WeightHost,
        serving: Candidate,
        admission: Admission,
        settings: CommitSettings,
        clock: Callable[[], float],
    ) -> None:
        """`serving` is what the host has loaded; `clock` counts seconds."""
        self._host = host
        self._serving = serving
        self._admission = admission
        self._settings = settings
        self._clock = clock
        self._prepared: dict[VersionId, Candidate] = {}
        self._lock = asyncio.Lock()
        self._paused = False
        self._last: CommitReport | None = None
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def version(self) -> VersionId:
        """The committed version."""
        return self._serving.version

    async def verify_first(self) -> None:
        """Loads the first version as a push does, checks its canaries, then opens the door.

        It is loaded already. Loading it again shows now that a roll-back to it will work, and the first push is no slower than
        the others.

        Raises:
            Aborted: If the canaries do not agree.
        """
        await self._call("freeze", self._host.freeze())
        await self._call("load", self._host.load(self._serving))
        await self._check(self._serving)
        await self._call("thaw", self._host.thaw())
        self._admission.open()

    async def prepare(self, version: VersionId, directory: Path) -> None:
        """See `GenerationEngine.prepare`."""
        candidate = await asyncio.to_thread(read_candidate, version, directory)
        check_fits(candidate, self._serving)
        self._prepared[version] = candidate

    def forget(self, version: VersionId) -> None:
        """See `GenerationEngine.abort_version`."""
        self._prepared.pop(version, None)

    async def commit(self, version: VersionId) -> CommitReport:
        """See `GenerationEngine.commit`. Committing the serving version again returns its report."""
        async with self._lock:
            self._check_alive()
            if self._last is not None and version == self._last.version == self.version:
                return self._last
            candidate = self._prepared.pop(version, None)
            if candidate is None:
                raise FailedPrecondition(f"version {version} was not prepared; call PrepareVersion first")
            # A caller that gives up half-way must not leave the engine half-way.
            return await finish(asyncio.create_task(self._transaction(candidate)))

    async def pause(self) -> None:
        """See `GenerationEngine.pause`."""
        async with self._lock:
            self._check_alive()
            self._paused = True
            self._admission.shut()
            await self._call("freeze", self._host.freeze())

    async def resume(self) -> None:
        """See `GenerationEngine.resume`."""
        async with self._lock:
            self._check_alive()
            self._paused = False
            await self._call("thaw", self._host.thaw())
            self._admission.open()

    async def wait_dead(self) -> str:
        """Returns the reason when the engine can no longer serve."""
        return await asyncio.shield(self._dead)

    async def die(self, reason: str) -> None:
        """Ends the engine's service. Idempotent."""
        if not self._dead.done():
            self._dead.set_result(reason)
            self._admission.end(reason)
            await self._host.halt(reason)

    async def _transaction(self, candidate: Candidate) -> CommitReport:
        started = self._clock()
        self._admission.shut()
        carried = 0
        try:
            async with self._deadline():
                await self._call("freeze", self._host.freeze())
                carried = self._admission.running
                await self._call("load", self._host.load(candidate))
                error = await self._check(candidate)
        except Exception as failure:  # whatever it was: what is loaded now must not serve
            await self._roll_back(candidate.version, failure)
            raise Aborted(f"version {candidate.version} did not take, {self.version} serves: {failure}") from failure
        self._serving = candidate
        await self._go_on()
        self._last = CommitReport(candidate.version, self._clock() - started, error, carried)
        return self._last

    async def _roll_back(self, failed: VersionId, failure: Exception) -> None:
        try:
            async with self._deadline():
                await self._call("freeze", self._host.freeze())
                await self._call("load", self._host.load(self._serving))
                await self._check(self._serving)
        except Exception as second:
            reason = f"version {failed} did not take ({failure}), and {self.version} could not be restored ({second})"
            await self.die(reason)
            raise Unavailable(reason) from second
        await self._go_on()

    async def _go_on(self) -> None:
        if self._paused:
            # The canaries may have needed the host to run; the operator's pause still stands.
            await self._or_die("freeze", self._host.freeze())
        else:
            await self._or_die("thaw", self._host.thaw())
            self._admission.open()

    async def _or_die(self, name: str, call: Awaitable[None]) -> None:
        try:
            await self._call(name, call)
        except Exception as error:
            await self.die(f"the engine failed at {name}: {error}")
            raise

    async def _check(self, candidate: Candidate) -> float:
        canaries = candidate.manifest.canaries
        found = await self._call("canary", self._host.canary_logprobs([canary.token_ids for canary in canaries]))
        errors = [
            abs(value - expected)
            for values, canary in zip(found, canaries, strict=True)
            for value, expected in zip(values[canary.start - 1 :], canary.logprobs, strict=True)
        ]
        worst = math.inf if any(math.isnan(error) for error in errors) else max(errors)
        if worst > self._settings.canary_tolerance:
            raise Aborted(
                f"the canaries of version {candidate.version} are off by {worst:.3g} nats; at most "
                f"{self._settings.canary_tolerance:g} is allowed: the loaded weights are not the learner's"
            )
        return worst

    async def _call(self, name: str, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._settings.call_timeout_s):
                return await call
        except TimeoutError as error:
            raise Unavailable(f"the engine did not answer {name} within {self._settings.call_timeout_s:g} s") from error

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                yield
        except TimeoutError as error:
            raise Unavailable(f"it took more than {self._settings.timeout_s:g} s") from error

    def _check_alive(self) -> None:
        if self._dead.done():
            raise Unavailable(self._dead.result())


async def finish(task: asyncio.Task[T]) -> T:
    """Waits for `task` to its end, even if the waiting is cancelled; then the cancellation goes on."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen, so that asyncio does not report it as lost
        raise
