"""The change of weights as one transaction: prepare, freeze, load, verify by canaries, thaw; or roll back.

Invariants:

* The host thaws only with weights whose canaries have just passed.
* The version changes only after that, and back never happens silently: a failed commit raises
  Aborted if the version is at fault (its canaries), Unavailable if the engine is.
* If the last good version cannot be restored, the host stays frozen for ever and `wait_dead`
  returns.
* A commit that has begun runs to its end even if its caller goes away.
* Nothing is prepared or committed before a first version has passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from honed.artifacts.version import VersionId
from honed.generation.canaries import Measured, check_tolerance, default_tolerance, tell_apart
from honed.generation.candidate import Candidate, check_fits, read_candidate
from honed.generation.engine import CommitReport, CommitSettings
from honed.generation.gate import RequestGate
from honed.kit.errors import Aborted, FailedPrecondition, InvalidArgument, Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FINDINGS = (Aborted, FailedPrecondition, InvalidArgument)
"""Errors of a commit that say something about the version. Any other says that the engine, or this host, failed meanwhile:
so does DataLoss, for `prepare` has found every byte of the version to be right."""


class WeightHost(Protocol):
    """What a transaction needs of an engine. Deadlines are the transaction's business."""

    async def freeze(self) -> None:
        """Stops sampling and keeps every request. Also while it is frozen already."""

    async def stage(self, candidate: Candidate) -> None:
        """Loads weights beside those that serve, while sampling goes on. At most one version is staged; the newest stays."""

    async def unstage(self) -> None:
        """Frees what is staged, or what a `load` of the staged version left."""

    async def load(self, candidate: Candidate) -> None:
        """Replaces all weights, labels what they will sample, and forgets all that the old ones had computed.

        Fast if the candidate is staged, or served before the last call and nothing was staged
        since. Otherwise its files are read.
        """

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
        first: Candidate,
        gate: RequestGate,
        settings: CommitSettings,
        clock: Callable[[], float],
        *,
        dtype: str = "float32",
    ) -> None:
        """`first` is what the host has loaded, computing in `dtype`; `clock` counts seconds."""
        self._host = host
        self._first = first
        self._serving: Candidate | None = None
        self._measured: Measured | None = None
        self._gate = gate
        self._settings = settings
        self._clock = clock
        self._dtype = dtype
        self._prepared: dict[VersionId, Candidate] = {}
        self._staging = asyncio.Lock()  # who holds it may fill or empty the host's second set; taken before `_lock`
        self._lock = asyncio.Lock()
        self._paused = False
        self._last: CommitReport | None = None
        self._undone: tuple[VersionId, str] | None = None  # the last commit that was rolled back, and why
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def version(self) -> VersionId:
        """The committed version. Raises Unavailable before the first has passed."""
        return self._current.version

    async def start(self, candidate: Candidate) -> None:
        """Serves a first version if its canaries pass, and opens the door. If it does not pass, another one may be tried.

        Raises:
            FailedPrecondition: If it does not fit what the host has loaded.
            Aborted: If its canaries do not agree.
        """
        async with self._staging, self._lock:
            self._check_alive()
            check_fits(candidate, self._first)
            await self._call("freeze", self._host.freeze())
            await self._call("load", self._host.load(candidate), self._load_s(candidate))
            self._measured = await self._check(candidate)
            await self._call("thaw", self._host.thaw())
            self._serving = candidate
            self._gate.open()

    async def prepare(self, version: VersionId, directory: Path) -> None:
        """See `GenerationEngine.prepare`."""
        serving = self._current
        candidate = await asyncio.to_thread(read_candidate, version, directory)
        check_fits(candidate, serving)
        async with self._staging:
            self._check_alive()
            await self._call("stage", self._host.stage(candidate), self._load_s(candidate))
            self._prepared[version] = candidate

    async def forget(self, version: VersionId) -> None:
        """See `GenerationEngine.abort_version`."""
        async with self._staging:
            if self._prepared.pop(version, None) is not None:
                await self._call("unstage", self._host.unstage())

    async def commit(self, version: VersionId) -> CommitReport:
        """See `GenerationEngine.commit`. Committing the serving version again returns its report."""
        async with self._staging, self._lock:
            self._check_alive()
            if self._last is not None and version == self._last.version == self.version:
                return self._last
            serving = self._current
            candidate = self._prepared.pop(version, None)
            if candidate is None:
                failed, reason = self._undone or (None, "")
                why = f". Its last commit was rolled back: {reason}" if failed == version else ""
                raise FailedPrecondition(f"version {version} was not prepared; call PrepareVersion first{why}")
            # A caller that gives up half-way must not leave the engine half-way.
            return await finish(asyncio.create_task(self._transaction(candidate, serving)))

    async def pause(self) -> None:
        """See `GenerationEngine.pause`."""
        async with self._lock:
            self._check_alive()
            self._paused = True
            self._gate.shut()
            await self._call("freeze", self._host.freeze())

    async def resume(self) -> None:
        """See `GenerationEngine.resume`."""
        async with self._lock:
            self._check_alive()
            self._paused = False
            await self._call("thaw", self._host.thaw())
            self._gate.open()

    async def wait_dead(self) -> str:
        """Returns the reason when the engine can no longer serve."""
        return await asyncio.shield(self._dead)

    async def die(self, reason: str) -> None:
        """Ends the engine's service. Idempotent."""
        if not self._dead.done():
            self._dead.set_result(reason)
            self._gate.end(reason)
            await self._host.halt(reason)

    @property
    def _current(self) -> Candidate:
        self._check_alive()
        if self._serving is None:
            raise Unavailable("no version serves yet: the engine is starting, and verifies its first one; try again")
        return self._serving

    async def _transaction(self, candidate: Candidate, serving: Candidate) -> CommitReport:
        started = self._clock()
        self._gate.shut()
        carried = 0
        try:
            async with self._deadline(candidate):
                await self._call("freeze", self._host.freeze())
                carried = self._gate.running
                await self._call("load", self._host.load(candidate), self._load_s(candidate))
                measured = await self._check(candidate)
                apart = None if self._measured is None else tell_apart(measured, self._measured)
        except Exception as failure:  # whatever it was: what is loaded now must not serve
            await self._roll_back(candidate.version, serving, failure)
            self._undone = candidate.version, str(failure)
            # Whoever pushes leaves a version for good that is called Aborted: an engine that was slow is no reason for that.
            raised = Aborted if isinstance(failure, _FINDINGS) else Unavailable
            raise raised(f"version {candidate.version} did not take, {serving.version} serves: {failure}") from failure
        self._serving, self._measured = candidate, measured
        if apart is False:
            logger.info("the step from %s to %s is too small for the canaries to tell", serving.version, candidate.version)
        await self._go_on()
        self._last = CommitReport(candidate.version, self._clock() - started, measured.max_error, carried, apart)
        return self._last

    async def _roll_back(self, failed: VersionId, serving: Candidate, failure: Exception) -> None:
        try:
            async with self._deadline(serving):
                await self._call("freeze", self._host.freeze())
                await self._call("load", self._host.load(serving), self._load_s(serving))
                await self._check(serving)
        except Exception as second:
            reason = f"version {failed} did not take ({failure}), and {serving.version} could not be restored ({second})"
            await self.die(reason)
            raise Unavailable(reason) from second
        await self._go_on()

    async def _release(self) -> None:
        """Frees the weights that do not serve. What fails here costs memory and no more."""
        try:
            await self._call("unstage", self._host.unstage())
        except Exception:
            logger.warning("the weights that do not serve were not freed", exc_info=True)

    async def _go_on(self) -> None:
        # Before the host steps again: its next step computes every prefix anew, and an answer would wait for that.
        await self._release()
        if self._paused:
            # The canaries may have needed the host to run; the operator's pause still stands.
            await self._or_die("freeze", self._host.freeze())
        else:
            await self._or_die("thaw", self._host.thaw())
            self._gate.open()

    async def _or_die(self, name: str, call: Awaitable[None]) -> None:
        try:
            await self._call(name, call)
        except Exception as error:
            await self.die(f"the engine failed at {name}: {error}")
            raise

    async def _check(self, candidate: Candidate) -> Measured:
        manifest, tolerance = candidate.manifest, self._settings.canary_tolerance
        prompts = [canary.token_ids for canary in manifest.canaries]
        measured = Measured.of(manifest, await self._call("canary", self._host.canary_logprobs(prompts)))
        check_tolerance(measured, default_tolerance(self._dtype, manifest) if tolerance is None else tolerance)
        return measured

    async def _call(self, name: str, call: Awaitable[T], more_s: float = 0.0) -> T:
        limit = self._settings.call_timeout_s + more_s
        try:
            async with asyncio.timeout(limit):
                return await call
        except TimeoutError as error:
            raise Unavailable(f"the engine did not answer {name} within {limit:g} s") from error

    def _load_s(self, candidate: Candidate) -> float:
        """What reading a version may take, beyond the time of a call that reads nothing."""
        return candidate.weight_bytes / self._settings.load_bytes_per_s

    @asynccontextmanager
    async def _deadline(self, candidate: Candidate) -> AsyncIterator[None]:
        limit = self._settings.timeout_s + self._load_s(candidate)
        try:
            async with asyncio.timeout(limit):
                yield
        except TimeoutError as error:
            raise Unavailable(f"it took more than {limit:g} s") from error

    def _check_alive(self) -> None:
        if self._dead.done():
            raise Unavailable(self._dead.result())


async def finish(task: asyncio.Task[T]) -> T:
    """Waits for `task` to its end, even if the waiting is cancelled; then the cancellation goes on."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):  # whoever cancels again gets nothing sooner
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen, so that asyncio does not report it as lost
        raise
