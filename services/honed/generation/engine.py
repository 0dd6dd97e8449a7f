"""The port of a generation engine: sampling from the live policy, and the transactional change of its weights.

What each implementation keeps:

* Every token carries the version that sampled it, and its log-probability is that version's own,
  given the whole prefix.
* No token that leaves the engine was sampled by weights whose canary check had not passed.
* A change of weights fails no request: those in flight go on afterwards, those that arrive
  meanwhile wait.
* Cancelling `complete` or closing `generate` frees the engine of the request.
* A request leaves the gate as soon as the engine has ended it. What the caller of `generate` has
  not read by then waits for it, `max_tokens` tokens at most.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from honed.artifacts.version import VersionId
from honed.generation.requests import Chunk, EngineLimits, EngineRequest


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What a committed push was like.

    Attributes:
        version: The version that serves now.
        pause_s: Seconds from the pause to the moment that sampled tokens may leave the engine
            again.
        canary_max_error: The largest difference of a canary's log-probability from the manifest's,
            nats.
        requests_carried: Requests that were in flight at the pause and went on after it.
        canaries_tell_apart: Whether the canaries could tell this version from the one that served
            before: False after a step too small for them, None where the two have no canary text in
            common.
    """

    version: VersionId
    pause_s: float
    canary_max_error: float
    requests_carried: int
    canaries_tell_apart: bool | None = None


@dataclass(frozen=True, slots=True)
class CommitSettings:
    """Bounds of a change of weights.

    Attributes:
        canary_tolerance: The largest difference of a canary's log-probability that passes, nats.
            None: by the coarser of the engine's and the files' types, see
            `canaries.default_tolerance`.
        call_timeout_s: Deadline of each single call into the engine that loads nothing.
        timeout_s: Deadline from the pause to the verified weights; a roll-back has as long again.
        load_bytes_per_s: Deadlines of what reads weights grow by the weights' size over this.
    """

    canary_tolerance: float | None = None
    call_timeout_s: float = 30.0
    timeout_s: float = 60.0
    load_bytes_per_s: float = 50e6


class GenerationEngine(Protocol):
    """One model being sampled from. All methods belong to the event loop that called `start`."""

    @property
    def version(self) -> VersionId:
        """The committed version.

        Raises:
            Unavailable: Before `start` has found a version that passes.
        """

    @property
    def refused(self) -> Mapping[VersionId, str]:
        """The versions that `start` passed over, with the reason."""

    @property
    def disagreeing(self) -> Collection[VersionId]:
        """Those of them whose canaries did not agree."""

    @property
    def in_flight(self) -> int:
        """Requests accepted and not ended, those that wait for a commit included."""

    @property
    def limits(self) -> EngineLimits:
        """What fits. Known after `start`."""

    @property
    def description(self) -> str:
        """Name and version of the engine, for example `vllm 0.32.0`."""

    @property
    def longest_token(self) -> int:
        """Characters of the longest token of the policy's tokenizer: no text has more characters for each of its tokens."""

    @property
    def progress(self) -> int:
        """A number that is another one whenever a token has been sampled for a request in flight."""

    async def start(self) -> None:
        """Serves the first of the given versions that is whole and whose canaries agree with the loaded weights.

        Raises:
            Unavailable: If the engine cannot be started; the message says what is missing.
            Aborted: If no version passed; the message gives the reason of each.
        """

    async def complete(self, request: EngineRequest) -> Chunk:
        """Samples a response and returns it whole: the cheap path.

        Raises:
            InvalidArgument: If the request does not fit the limits.
            Overloaded: If the queue is full.
            Unavailable: If the engine died or is closed.
        """

    def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """Samples a response chunk by chunk; the last one has a finish reason. Raises like `complete`."""

    async def prepare(self, version: VersionId, directory: Path) -> None:
        """Verifies the version at `directory` and loads it beside the serving one, which goes on serving.

        The directory must stay until another version has been committed after it: a roll-back may
        read it again.

        Raises:
            FailedPrecondition: If its architecture or tokenizer differs from what is loaded, or it
                has no canaries.
            DataLoss: If files are missing or damaged.
            Unavailable: If it cannot be loaded, or no version serves yet. Nothing of it is kept.
        """

    async def commit(self, version: VersionId) -> CommitReport:
        """Swaps in the prepared version and checks its canaries before anything that it samples leaves the engine.

        Raises:
            FailedPrecondition: If the version was not prepared.
            Aborted: If the version is at fault, as when its canaries do not agree. The last good
                version serves again, and no request failed.
            Unavailable: If the engine is at fault, as when it did not answer in time. The last good
                version serves again, and the same version may take after another `prepare`; or
                that could not be restored either, and the engine is dead.
        """

    async def abort_version(self, version: VersionId) -> None:
        """Forgets a prepared version and frees what it takes; nothing happens if it was not prepared."""

    async def pause(self) -> None:
        """Freezes what is in flight. New requests wait. A commit is possible and leaves the engine paused."""

    async def resume(self) -> None:
        """Lets everything go on."""

    async def wait_dead(self) -> str:
        """Returns the reason when the engine can no longer serve. The process should exit then, to be restarted."""

    async def close(self) -> None:
        """Ends what is in flight with `Unavailable` and frees everything. Idempotent."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` by the policy's tokenizer, with its special tokens."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, without special tokens."""


@dataclass(frozen=True, slots=True)
class InitialVersion:
    """A version that an engine may serve first.

    Attributes:
        version: Its name.
        directory: Its verified directory; or a function that fetches it, called in a thread when
            its turn comes.
    """

    version: VersionId
    directory: Path | Callable[[], Path]

    def fetched(self) -> Path:
        """The directory. Blocks; raises what the function raises."""
        return self.directory() if callable(self.directory) else self.directory
