"""The online loop as the conductor sees it: prompts in, the learner watched, every rollout accounted for at the end."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from honed.conductor.feeder import Feeder
from honed.conductor.fleet import Fleet
from honed.conductor.leadership import Leadership, Unopposed
from honed.conductor.prompt_file import PromptFile
from honed.conductor.prompts import PromptMix
from honed.conductor.rates import Growth
from honed.conductor.state import RunState
from honed.conductor.submission import submit_prompts
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition
from honed.models.prompts import PromptEncoder
from honed.queue.admission import AdmissionPolicy
from honed.queue.connection import RetryPolicy
from honed.queue.inbox import PromptInbox
from honed.queue.keys import RunKeys
from honed.queue.lease import HeldLease, LeaseHeld, LeaseLost, Leases, TermOver
from honed.runtime import consumer_name, internal_channel, redis_link
from honed.v1 import common_pb2, conductor_pb2, learner_pb2, learner_pb2_grpc

logger = logging.getLogger(__name__)

LEASE_MS = 10_000
POLL_S = 0.5
STATUS_TIMEOUT_S = 5.0
_AT_WORK = (
    learner_pb2.LEARNER_STATE_WAITING,
    learner_pb2.LEARNER_STATE_TRAINING,
    learner_pb2.LEARNER_STATE_PAUSED,
)
SUBMIT_TIMEOUT_S = 5.0


class OnlineLoop:
    """Feeds the loop until the learner has made its updates."""

    def __init__(self, settings: RunSettings, fleet: Fleet, state: RunState, leadership: Leadership | None = None) -> None:
        """Connects to nothing yet. Without `leadership` the lease in Redis alone decides who feeds the run."""
        self._settings, self._fleet, self._state = settings, fleet, state
        self._leadership = leadership or Unopposed()
        self._submissions: tuple[PromptInbox, PromptEncoder] | None = None

    async def run(self, prompts: Path, tokenizer: Path) -> None:
        """Returns when the learner has made its updates and the streams are empty. A Redis that is away costs time only.

        One conductor feeds a run: while another one does, this one waits for its end.

        Args:
            prompts: the file to train on.
            tokenizer: a directory with the policy's tokenizer.

        Raises:
            LeaseLost: another conductor has taken the run over.
            TermOver: another conductor has been chosen.
            ValueError: a prompt cannot be used; names file and line.
            FailedPrecondition: the streams do not become empty.
        """
        settings = self._settings
        keys = RunKeys(settings.run)
        encoder, file = await asyncio.to_thread(self._opened, prompts, tokenizer)
        mix = PromptMix(settings.run, file, encoder, settings.seed, settings.conductor)
        doing = self._state.doing
        async with (
            redis_link(settings, RetryPolicy(math.inf), self._fleet.redis_url) as link,
            self._lease(Leases(link, keys)) as lease,
        ):
            self._state.doing = doing
            policy = AdmissionPolicy(
                settings.learner.batch,
                settings.learner.max_staleness,
                settings.conductor.max_in_flight,
                settings.conductor.samples_per_prompt,
            )
            feeder = Feeder(link, keys, lease, mix, policy, steps=settings.learner.steps)
            self._submissions = PromptInbox(link.within(SUBMIT_TIMEOUT_S), keys), encoder
            try:
                await self._watched(feeder)
                while not await self._drained(feeder):
                    await self._watched(feeder)
            finally:
                self._submissions = None
                file.close()

    async def watch(self) -> None:
        """For an algorithm that samples nothing: returns when the learner has made its updates. It is fed nothing."""
        async with internal_channel(self._settings, self._fleet.target("learner")) as channel:
            stub = learner_pb2_grpc.LearnerServiceStub(channel)
            while (status := await self._status(stub)) is None or status.state != learner_pb2.LEARNER_STATE_FINISHED:
                failed = status is not None and status.state == learner_pb2.LEARNER_STATE_FAILED
                if failed and self._state.phase != conductor_pb2.RUN_PHASE_FAILED:
                    # A person may let it go on (Resume, Rollback): the run stays up meanwhile.
                    self._state.enter(conductor_pb2.RUN_PHASE_FAILED, "training has stopped; serving goes on")
                elif status is not None and not failed and self._state.phase == conductor_pb2.RUN_PHASE_FAILED:
                    self._state.enter(conductor_pb2.RUN_PHASE_PPO, "training on judgements")
                await asyncio.sleep(POLL_S)

    async def submit_prompts(self, request: conductor_pb2.SubmitPromptsRequest) -> conductor_pb2.SubmitPromptsResponse:
        """Adds prompts to those that the run trains on; raises as `honed.conductor.submission.submit_prompts` does.

        Raises:
            FailedPrecondition: the online loop does not run.
        """
        if self._submissions is None:
            raise FailedPrecondition("prompts can be submitted while the online loop runs: `honed status` shows the phase")
        inbox, encoder = self._submissions
        return await submit_prompts(request, inbox, encoder, self._settings.conductor.prompt_mix)

    @asynccontextmanager
    async def _lease(self, leases: Leases) -> AsyncIterator[HeldLease]:
        """The run's lease. The queue takes prompts from its holder, and from nobody whose term is over."""
        name = "conductor"
        term = await self._leadership.above(await leases.term(name))
        try:
            async with leases.held(
                name, consumer_name(name), LEASE_MS, above=term, term=term, wait_s=math.inf, on_wait=self._waits
            ) as lease:
                yield lease
        except (LeaseLost, TermOver):
            self._leadership.doubt()
            raise

    def _waits(self, reason: LeaseHeld) -> None:
        self._state.doing = f"waiting: another conductor feeds this run, and this one goes on after it ({reason})"

    async def until_behind(self, unless_at: common_pb2.PolicyVersion | None = None) -> None:
        """Returns when the learner has updates to make: somebody let a finished one go back, here or at the learner itself.

        Args:
            unless_at: A version from which training could not go on.
        """
        async with internal_channel(self._settings, self._fleet.target("learner")) as channel:
            stub = learner_pb2_grpc.LearnerServiceStub(channel)
            while True:
                status = await self._status(stub)
                at_work = status is not None and status.state in _AT_WORK and status.version != unless_at
                if status is not None and at_work and status.version.step < status.target_steps:
                    return
                await asyncio.sleep(POLL_S)

    async def _watched(self, feeder: Feeder) -> None:
        """Admits prompts while the learner trains, through its restarts, until it has made its updates."""
        growth = Growth(self._settings.conductor.dead_letter_window_s)
        async with internal_channel(self._settings, self._fleet.target("learner")) as channel, asyncio.TaskGroup() as group:
            stub = learner_pb2_grpc.LearnerServiceStub(channel)
            stopping = asyncio.Event()
            feeding = group.create_task(feeder.run(stopping))
            while True:
                self._note(feeder)
                self._state.alarm("dead letters", self._dead_alarm(growth.read(feeder.depths.dead, time.monotonic())))
                status = await self._status(stub)
                if status is not None:
                    if status.state == learner_pb2.LEARNER_STATE_FINISHED:
                        break
                    failed = status.state == learner_pb2.LEARNER_STATE_FAILED
                    if failed and not feeding.done():
                        # A person may let it go on (Resume, Rollback): the run stays up and admits nothing meanwhile.
                        stopping.set()
                        await feeding
                        self._state.enter(conductor_pb2.RUN_PHASE_FAILED, "training has stopped; serving goes on")
                    elif not failed and feeding.done():
                        stopping.clear()
                        feeding = group.create_task(feeder.run(stopping))
                        self._state.enter(conductor_pb2.RUN_PHASE_PPO, "online loop")
                await asyncio.sleep(POLL_S)
            stopping.set()
            await feeding

    async def _status(self, stub: learner_pb2_grpc.LearnerServiceAsyncStub) -> learner_pb2.GetStatusResponse | None:
        try:
            status = await stub.GetStatus(learner_pb2.GetStatusRequest(), timeout=STATUS_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:  # it may be starting again
            logger.info("the learner does not answer", extra={"reason": error.details()})
            return None
        self._state.learner = status
        self._state.alarm("learner", status.alarm)
        return status

    def _note(self, feeder: Feeder) -> None:
        """Copies what the feeder saw last, for those who ask where the run stands."""
        state = self._state
        state.depths, state.admitted, state.accounts = feeder.depths, feeder.admitted, feeder.accounts.by_name()
        state.figures = feeder.figures
        if feeder.snapshot is not None:
            state.stages = feeder.snapshot.stages

    def _dead_alarm(self, grown: int) -> str:
        section = self._settings.conductor
        if grown <= section.dead_letter_limit:
            return ""
        return (
            f"{grown} prompts and rollouts became dead letters within {section.dead_letter_window_s:g} s: "
            "`honed dead list` shows the reasons"
        )

    async def _drained(self, feeder: Feeder) -> bool:
        """Waits until the streams are empty: each rollout has then trained, or left for a reason that is counted.

        False when a roll-back came meanwhile: the learner drops nothing any more, and needs to be fed.
        """
        end = time.monotonic() + self._settings.conductor.drain_timeout_s
        while (snapshot := await feeder.look()) and feeder.depths.in_flight:
            self._note(feeder)
            if snapshot.progress is not None and snapshot.progress.update < (self._settings.learner.steps or 0):
                return False
            if time.monotonic() > end:
                raise FailedPrecondition(
                    f"the streams were not empty {self._settings.conductor.drain_timeout_s:g} s after the last update "
                    f"({feeder.depths}): `honed status` says which service stands still"
                )
            await asyncio.sleep(0.2)
        self._note(feeder)
        return True

    def _opened(self, path: Path, tokenizer: Path) -> tuple[PromptEncoder, PromptFile]:
        encoder = PromptEncoder.of_model(tokenizer, longest=self._settings.longest_prompt)
        return encoder, PromptFile(path, encoder)
