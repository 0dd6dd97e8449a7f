"""The online loop as the conductor sees it: prompts in, the learner watched, every rollout accounted for at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from honed.conductor.admitter import Admitter
from honed.conductor.fleet import Fleet
from honed.conductor.prompts import PromptSequence
from honed.conductor.rates import Growth
from honed.conductor.state import RunState
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, HonedError, Unavailable
from honed.kit.wiring import consumer_name, internal_channel, redis_url
from honed.queue.admission import Admission, AdmissionPolicy
from honed.queue.connection import Link, Outage
from honed.queue.keys import STAGES, RunKeys
from honed.queue.lease import Claim, Leases
from honed.queue.stream import WorkQueue
from honed.v1 import conductor_pb2, learner_pb2, learner_pb2_grpc

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 2.0
LEASE_MS = 10_000
POLL_S = 0.5
STATUS_TIMEOUT_S = 5.0


class OnlineLoop:
    """Feeds the loop until the learner has made its updates."""

    def __init__(self, settings: RunSettings, fleet: Fleet, state: RunState, tokenizer: Path) -> None:
        """`tokenizer` is a directory with the policy's tokenizer."""
        self._settings, self._fleet, self._state, self._tokenizer = settings, fleet, state, tokenizer

    async def run(self, prompts: Path) -> None:
        """Returns when the learner has made its updates and the streams are empty. A Redis that is away costs time only.

        Raises:
            LeaseLost: another conductor feeds this run.
            ValueError: a prompt cannot be used; names file and line.
        """
        sequence = await asyncio.to_thread(self._sequence, prompts)
        while True:
            try:
                await self._fed(sequence)
            except* Unavailable as group:
                self._state.alarm("redis", f"no prompts are admitted: {group.exceptions[0]}")
                logger.warning("admission stands still; trying again", extra={"reason": str(group.exceptions[0])})
            else:
                self._state.alarm("redis", "")
                return
            await asyncio.sleep(POLL_S)

    async def _fed(self, sequence: PromptSequence) -> None:
        settings = self._settings
        url = self._fleet.redis_url or redis_url(settings)
        async with Link(url, outage=Outage(settings.queue.outage_s)) as link, self._leased(link) as claim:
            keys = RunKeys(settings.run)
            name = consumer_name("conductor")
            queues = {stage: WorkQueue(link, keys, stage, name) for stage in STAGES}
            admitter = Admitter(
                AdmissionPolicy(settings.learner.batch, settings.learner.max_staleness, settings.conductor.max_in_flight),
                Admission(link, keys),
                claim,
                queues,
                sequence,
                samples_per_prompt=settings.conductor.samples_per_prompt,
                target=(settings.learner.steps or 1 << 40) * settings.learner.batch,
            )
            self._state.alarm("redis", "")
            await self._watched(admitter)
            await self._drained(admitter)
            self._state.admitted = admitter.position
            self._state.stages = {stage: await queue.stats() for stage, queue in queues.items()}

    async def _watched(self, admitter: Admitter) -> None:
        """Admits prompts while the learner trains, through its restarts, until it has made its updates."""
        growth = Growth(self._settings.conductor.dead_letter_window_s)
        async with internal_channel(self._settings, self._fleet.target("learner")) as channel, asyncio.TaskGroup() as group:
            stub = learner_pb2_grpc.LearnerServiceStub(channel)
            finished = asyncio.Event()
            feeding = group.create_task(admitter.run(finished))
            while True:
                depths = self._state.depths = await admitter.depths()
                self._state.admitted = admitter.position
                self._state.alarm("dead letters", self._dead_alarm(growth.read(depths.dead, time.monotonic())))
                try:
                    status = await stub.GetStatus(learner_pb2.GetStatusRequest(), timeout=STATUS_TIMEOUT_S)
                except grpc.aio.AioRpcError as error:  # it may be starting again
                    logger.info("the learner does not answer", extra={"reason": error.details()})
                else:
                    self._state.learner = status
                    self._state.alarm("learner", status.alarm)
                    if status.state == learner_pb2.LEARNER_STATE_FINISHED:
                        break
                    if status.state == learner_pb2.LEARNER_STATE_FAILED and not feeding.done():
                        # A person may let it go on (Resume, Rollback): the run stays up and admits nothing meanwhile.
                        finished.set()
                        await feeding
                        self._state.enter(conductor_pb2.RUN_PHASE_FAILED, "training has stopped; serving goes on")
                    elif status.state != learner_pb2.LEARNER_STATE_FAILED and feeding.done():
                        finished.clear()
                        feeding = group.create_task(admitter.run(finished))
                        self._state.enter(conductor_pb2.RUN_PHASE_PPO, "online loop")
                await asyncio.sleep(POLL_S)
            finished.set()
            await feeding

    def _dead_alarm(self, grown: int) -> str:
        section = self._settings.conductor
        if grown <= section.dead_letter_limit:
            return ""
        return (
            f"{grown} prompts and rollouts became dead letters within {section.dead_letter_window_s:g} s: "
            "`honed dead list` shows the reasons"
        )

    async def _drained(self, admitter: Admitter) -> None:
        """Waits until the streams are empty: each rollout has then trained, or left for a reason that is counted."""
        end = time.monotonic() + self._settings.conductor.drain_timeout_s
        while (depths := await admitter.depths()).in_flight:
            self._state.depths = depths
            if time.monotonic() > end:
                raise FailedPrecondition(
                    f"the streams were not empty {self._settings.conductor.drain_timeout_s:g} s after the last update "
                    f"({depths}): `honed status` says which service stands still"
                )
            await asyncio.sleep(0.2)
        self._state.depths = depths

    @asynccontextmanager
    async def _leased(self, link: Link) -> AsyncIterator[Claim]:
        """Holds the conductor's lease, so that two conductors never feed one run."""
        leases = Leases(link, RunKeys(self._settings.run))
        end = time.monotonic() + 2 * LEASE_MS / 1000
        while True:
            try:
                claim = await leases.acquire("conductor", consumer_name("conductor"), LEASE_MS)
                break
            except FailedPrecondition:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(POLL_S)
        try:
            async with asyncio.TaskGroup() as group:
                keeping = group.create_task(leases.keep(claim, LEASE_MS))
                yield claim
                keeping.cancel()
        finally:
            # Also of a run that was stopped or failed, for its successor; without Redis the lease runs out by itself.
            with contextlib.suppress(HonedError, TimeoutError):
                async with asyncio.timeout(RELEASE_TIMEOUT_S):
                    await leases.release(claim)

    def _sequence(self, path: Path) -> PromptSequence:
        section, limits = self._settings.conductor, self._settings.generation
        longest = min(limits.max_prompt_tokens, limits.max_model_tokens - section.response_tokens)
        return PromptSequence.load(self._settings.run, path, self._tokenizer, self._settings.seed, section, longest=longest)
