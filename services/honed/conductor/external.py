"""Services that run elsewhere: others start them, and they are found where the settings and Redis say that they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import grpc

from honed.artifacts.reward_models import TRAINED, RewardModelStore
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.conductor.fleet import check_replicated
from honed.conductor.launcher import ProcessState
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, HonedError, Unavailable
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.keys import RunKeys
from honed.queue.members import REWARD, Members
from honed.runtime import check_addresses, internal_channel, redis_url
from honed.topology import SERVICES
from honed.v1 import learner_pb2, learner_pb2_grpc, preference_pb2, preference_pb2_grpc

POLL_S = 0.5
WATCH_S = 5.0
CALL_TIMEOUT_S = 5.0
_BASE: Final = VersionId(0, 0)
_REFUSED: Final = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

Probe = Callable[[], Awaitable[None]]
"""Returns when what is waited for is there; raises HonedError or AioRpcError, which say what is lacking, when it is not."""


class ExternalFleet:
    """Waits for what others start; starts and ends nothing, and reads no path of another machine."""

    def __init__(self, settings: RunSettings, store: PolicyStore) -> None:
        """Connects to nothing yet.

        Raises:
            FailedPrecondition: `queue.url` or the address of a service is not set.
        """
        self._settings, self._store = settings, store
        self.redis_url: str | None = redis_url(settings)
        self._states: dict[str, ProcessState] = {}
        check_addresses(settings)

    async def start_redis(self, timeout_s: float) -> None:
        """Waits for Redis, for as long as it takes; after `timeout_s` that is an alarm."""
        state = self._states.setdefault("redis", ProcessState("redis"))
        await _until(self._redis, state, "Redis does not answer: start it, or correct queue.url", timeout_s)
        state.ready = True

    async def start(self, service: str, timeout_s: float) -> None:
        """Waits for one process of the service, for as long as it takes; after `timeout_s` that is an alarm."""
        await self._ready(self._states.setdefault(service, ProcessState(service)), timeout_s)

    async def run_job(self, job: str) -> None:
        """Waits for the job's result, for as long as it takes; after `conductor.start_timeout_s` that is an alarm."""
        state = self._states.setdefault(job, ProcessState(job))
        probe, result = (self._base, "version 0.0") if job == "pretrain" else (self._reward_model, "reward model")
        lack = (
            f"the policy store {self._settings.policy_url} holds no {result} of the run: run `honed job {job}` once with this "
            "run's settings, where the files are that it names"
        )
        await _until(probe, state, lack, self._settings.conductor.start_timeout_s)
        del self._states[job]

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Looks every few seconds, as long as the block runs, whether services that were ready still are."""
        watching = [asyncio.create_task(self._watch(service)) for service in SERVICES]
        try:
            yield
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)

    def target(self, service: str) -> str:
        """See `Fleet`."""
        target: str = getattr(self._settings, service).target
        return target

    async def scale(self, service: str, replicas: int) -> list[str]:
        """Refuses: whoever started the processes scales them."""
        check_replicated(service)
        raise FailedPrecondition(
            f"this conductor starts no processes (conductor.launcher: none): scale {service} where it is deployed"
        )

    def states(self) -> list[ProcessState]:
        """The services as far as they were waited for, and a job whose result is."""
        return list(self._states.values())

    def address(self, process: str) -> str:
        """See `Fleet`; replicas have names of their own here."""
        return ""

    async def _watch(self, service: str) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            state = self._states.get(service)
            if state is not None and state.ready and await _lacking(self._probe(service)):
                state.ready = False
                await self._ready(state, self._settings.conductor.start_timeout_s)

    async def _ready(self, state: ProcessState, timeout_s: float) -> None:
        service = state.name
        where = f"at {self.target(service)}" if service in ("preference", "learner") else "registered in Redis"
        lack = f"no {service} service is ready {where}: start one by `honed serve {service}` with this run's settings"
        await _until(self._probe(service), state, lack, timeout_s)
        state.ready = True

    def _probe(self, service: str) -> Probe:
        probes: dict[str, Probe] = {"preference": self._preference, "learner": self._learner}
        return probes.get(service) or (lambda: self._registered(service))

    async def _redis(self) -> None:
        async with RedisLink(redis_url(self._settings), retry=RetryPolicy(CALL_TIMEOUT_S)) as link:
            await link.command("PING")

    async def _base(self) -> None:
        if _BASE not in await asyncio.to_thread(self._store.versions):
            raise Unavailable(f"run {self._settings.run!r} has no version {_BASE} there")

    async def _reward_model(self) -> None:
        """A reward service is ready only once it has its reward model, wherever that came from."""
        store = RewardModelStore(self._settings.policy_url, self._settings.run, TRAINED)
        if await asyncio.to_thread(store.latest) is None:
            await self._registered(REWARD)

    async def _registered(self, service: str) -> None:
        async with RedisLink(redis_url(self._settings), retry=RetryPolicy(CALL_TIMEOUT_S)) as link:
            members = await Members(link, RunKeys(self._settings.run), service).list()
        if not any(member.ready for member in members):
            raise Unavailable(f"{len(members)} processes are registered, and none of them is ready")

    async def _preference(self) -> None:
        async with internal_channel(self._settings, self.target("preference")) as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            await stub.GetStats(preference_pb2.GetStatsRequest(), timeout=CALL_TIMEOUT_S)

    async def _learner(self) -> None:
        async with internal_channel(self._settings, self.target("learner")) as channel:
            stub = learner_pb2_grpc.LearnerServiceStub(channel)
            status = await stub.GetStatus(learner_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
        if status.state == learner_pb2.LEARNER_STATE_STARTING:
            raise Unavailable("it is starting")


async def _until(probe: Probe, state: ProcessState, lack: str, timeout_s: float) -> None:
    """Returns when the probe does; after `timeout_s` what is lacking is the state's alarm until then."""
    clock = asyncio.get_running_loop().time
    late = clock() + timeout_s
    while reason := await _lacking(probe):
        if clock() >= late:
            state.alarm = f"{lack} ({reason})"
        await asyncio.sleep(POLL_S)
    state.alarm = ""


async def _lacking(probe: Probe) -> str:
    """Why the probe fails; empty when it does not."""
    try:
        await probe()
    except grpc.aio.AioRpcError as error:
        if error.code() in _REFUSED:
            return f"{error.details()}; every service needs the same tokens, security.tokens names their directory"
        return error.details() or error.code().name
    except (HonedError, OSError) as error:
        return str(error) or type(error).__name__
    return ""
