"""Brings a published version into the generators that are registered now.

Each one prepares it, then commits it, without waiting for the others: a version that cannot be fetched or verified somewhere
pauses nobody there, and a slow fetch keeps no other generator at the old version. A push succeeds with the first generator
that commits; those that do not answer catch up by themselves before they take training prompts or turn ready. A generator
that answers ABORTED (its canaries do not fit) or DATA_LOSS has refused the version: trying again cannot help.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc

from honed.artifacts.manifest import Manifest
from honed.artifacts.version import VersionId
from honed.queue.members import Members
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc

logger = logging.getLogger(__name__)

REFUSALS: Final = frozenset({grpc.StatusCode.ABORTED, grpc.StatusCode.DATA_LOSS})

if TYPE_CHECKING:  # the generated module has this name for type checkers alone
    Stub = generation_pb2_grpc.GenerationControlServiceAsyncStub

Generators = Callable[[], Awaitable[Sequence["Stub"]]]
"""A control stub for each generator that is registered now."""


@dataclass(frozen=True)
class PushReport:
    """How a push went.

    Attributes:
        version: What was pushed.
        committed: Generators that serve it now.
        failures: Why the others do not, one text each.
        pauses_s: How long in-flight requests stood still, one for each generator that changed its weights now.
        canary_max_error: Nats, the largest over all generators.
        carried: Requests that were in flight at a pause and went on.
        refusals: How many generators refused it.
    """

    version: VersionId
    committed: int
    failures: tuple[str, ...]
    pauses_s: tuple[float, ...] = ()
    canary_max_error: float = 0.0
    carried: int = 0
    refusals: int = 0

    @property
    def refused(self) -> bool:
        """Whether the version is bad: some generator refused it, and none took it."""
        return self.refusals > 0 and self.committed == 0


@dataclass(frozen=True)
class _Failure:
    text: str
    refusal: bool


class Pusher:
    """Pushes versions, one at a time."""

    def __init__(self, generators: Generators, *, timeout_s: float) -> None:
        """`timeout_s` is the deadline of each call."""
        self._generators, self._timeout_s = generators, timeout_s

    async def push(self, manifest: Manifest) -> PushReport:
        """Brings a version in, once; failures are in the report."""
        generators = await self._generators()
        version = common_pb2.PolicyVersion(run=manifest.run, fence=manifest.version.fence, step=manifest.version.step)
        # Without a key: after a failed commit it has to be done again.
        prepare = generation_pb2.PrepareVersionRequest(version=version, manifest_sha256=manifest.digest)
        key = f"{manifest.run}/{manifest.version}"
        commit = generation_pb2.CommitVersionRequest(version=version, idempotency_key=key)

        async def bring_in(generator: Stub) -> Any:
            answer = await self._attempt("prepare", generator.PrepareVersion, prepare)
            return answer if isinstance(answer, _Failure) else await self._attempt("commit", generator.CommitVersion, commit)

        answers = await asyncio.gather(*(bring_in(generator) for generator in generators))
        done = [answer for answer in answers if not isinstance(answer, _Failure)]
        failures = [answer for answer in answers if isinstance(answer, _Failure)]
        if not generators:
            failures = [_Failure("no generator is registered", refusal=False)]
        return PushReport(
            version=manifest.version,
            committed=len(done),
            failures=tuple(failure.text for failure in failures),
            pauses_s=tuple(answer.pause.ToNanoseconds() / 1e9 for answer in done if answer.HasField("pause")),
            canary_max_error=max((answer.canary_max_error for answer in done), default=0.0),
            carried=sum(answer.requests_carried for answer in done),
            refusals=sum(failure.refusal for failure in failures),
        )

    async def _attempt(self, what: str, call: Any, request: Any) -> Any:
        try:
            return await call(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            return _Failure(f"{what}: {error.code().name}: {error.details()}", error.code() in REFUSALS)


class RegisteredGenerators:
    """A channel to each registered generator, opened when it comes and closed when it has gone.

    To those that are ready, if there are any: one that loads or drains could only hold a push up, and catches up by itself.
    Where none is ready, all are tried: nobody is there to catch up with. A member's control address names one process, so
    Prepare and Commit of one push reach the same one.
    """

    def __init__(self, members: Members, connect: Callable[[str], grpc.aio.Channel], *, fallback: str = "") -> None:
        """Opens nothing yet.

        Args:
            members: The generators' list.
            connect: Opens a channel to an address.
            fallback: Address to push to while nobody is registered; empty for none.
        """
        self._members, self._connect, self._fallback = members, connect, fallback
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def __call__(self) -> list[Stub]:
        """The stubs of now."""
        members = [member for member in await self._members.list() if member.control_address]
        addresses = [member.control_address for member in members if member.ready]
        addresses = addresses or [member.control_address for member in members]
        if not addresses and self._fallback:
            addresses = [self._fallback]
        for gone in self._channels.keys() - set(addresses):
            await self._channels.pop(gone).close()
        for address in addresses:
            if address not in self._channels:
                self._channels[address] = self._connect(address)
        return [generation_pb2_grpc.GenerationControlServiceStub(self._channels[address]) for address in addresses]

    async def close(self) -> None:
        """Closes every channel."""
        while self._channels:
            await self._channels.popitem()[1].close()
