"""A run from its start to its end: services up, language model, reward model, online loop.

Each phase leaves its result behind and is skipped when the result is there: a run that was interrupted, or whose conductor was
killed, goes on where it was. What may pass by itself (a service or a store that does not answer, a disk that is full) ends no
phase: it is tried again, under an alarm. When training ends or fails, the services that were started go on serving.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc

from honed.artifacts.store import PolicyStore
from honed.artifacts.tokenizer import fetch_tokenizer
from honed.conductor.evaluation import Evaluation
from honed.conductor.fleet import Fleet
from honed.conductor.judgements import import_judgements
from honed.conductor.leadership import Leadership
from honed.conductor.online import OnlineLoop
from honed.conductor.prompt_file import check_prompts
from honed.conductor.roster import Roster
from honed.conductor.state import PHASE_NAMES, RunState
from honed.config import RunSettings
from honed.kit.aio import raise_if_cancelled
from honed.kit.errors import FailedPrecondition, Unavailable, may_pass, root_cause
from honed.kit.progress import JobProgress
from honed.phases import serves_reward
from honed.runtime import internal_channel
from honed.v1 import common_pb2, conductor_pb2, preference_pb2, preference_pb2_grpc
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

POLL_S = 1.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
CALL_TIMEOUT_S = 30.0
TRAINABLE_KINDS = ("pairwise", "ranking", "rating")
Hook = Callable[[], Awaitable[None]]


class Run:
    """One run over one fleet of services."""

    def __init__(self, settings: RunSettings, fleet: Fleet, store: PolicyStore, leadership: Leadership | None = None) -> None:
        """Starts nothing yet.

        Args:
            settings: with every port chosen.
            fleet: the services and jobs.
            store: the policy store.
            leadership: who chooses one conductor of several; None where the lease in Redis does.
        """
        self.settings, self.fleet, self.store = settings, fleet, store
        self.state = RunState()
        self.roster = Roster(settings, fleet)
        """Looks while somebody has it running."""
        self.stopping = asyncio.Event()
        self.workspace = Workspace(settings.directory)
        self.loop = OnlineLoop(settings, fleet, self.state, leadership)
        self.evaluation = Evaluation(settings, fleet, self.workspace)
        self._end_on_failure = False
        self.kept: Path | None = None  # where a fresh run put people's judgements aside

    async def execute(self, before_loop: Hook | None = None, *, end_on_failure: bool = False) -> None:
        """Goes through the phases; returns when the learner has made its updates, or the run was stopped.

        However training ends, no service is stopped here.

        Args:
            before_loop: awaited between the start of all services and the first prompt.
            end_on_failure: whether what may pass ends the run as well: a phase that could be tried again, a learner that has
                given up or dies again and again, a scorer that never gives a score. Otherwise all of that is waited for, under
                an alarm.

        Raises:
            Exception: training failed; the state says so too.
        """
        self._end_on_failure = end_on_failure
        await self._supervised(self._phases(before_loop))

    async def _supervised(self, phases: Coroutine[None, None, None]) -> None:
        """Runs phases until they end, the run is stopped, or it is to end with its learner."""
        work = asyncio.ensure_future(phases)
        lost = asyncio.ensure_future(self._lost())
        stop = asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait({work, lost, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
                self._enter(conductor_pb2.RUN_PHASE_FINISHED, "done")
            elif lost.done():
                raise Unavailable(lost.result())
            else:
                self._enter(conductor_pb2.RUN_PHASE_STOPPED, "stopped")
        except BaseException as error:
            self.state.error = _described(root_cause(error))
            self.state.alarm("training", f"training failed, serving goes on: {self.state.error}")
            self._enter(conductor_pb2.RUN_PHASE_FAILED, "training failed; what was started goes on serving")
            raise
        finally:
            self.state.ended_at = time.time()
            for task in (lost, stop, work):
                task.cancel()
            await asyncio.gather(work, lost, stop, return_exceptions=True)

    async def stand_by(self, *, end_on_failure: bool = False) -> None:
        """After training has ended: keeps everything serving until the run is stopped, and trains on after a roll-back.

        Training that fails is an alarm. It goes on when the learner is let go back again.

        Args:
            end_on_failure: as of `execute`.

        Raises:
            Exception: training failed, in a run that is to end then.
        """
        self._end_on_failure = end_on_failure
        stuck_at = self._learner_at() if self.state.phase == conductor_pb2.RUN_PHASE_FAILED else None
        while not self.stopping.is_set():
            try:
                if await self._unless_stopped(self.loop.until_behind(stuck_at)):
                    await self._supervised(self._train_on())
                    stuck_at = None
            except Exception as error:  # whatever it is, serving goes on
                raise_if_cancelled()
                if self._end_on_failure:
                    raise
                logger.exception("training after a roll-back has failed", extra={"reason": _described(root_cause(error))})
                stuck_at = self._learner_at()
                await self._unless_stopped(asyncio.sleep(POLL_S))

    def _learner_at(self) -> common_pb2.PolicyVersion | None:
        return self.state.learner.version if self.state.learner is not None else None

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Awaits it until the run is stopped; returns whether it came to its end."""
        working, stop = asyncio.ensure_future(work), asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait({working, stop}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
            return working.done()
        finally:
            for task in (working, stop):
                task.cancel()
            await asyncio.gather(working, stop, return_exceptions=True)

    async def _train_on(self) -> None:
        self._enter(conductor_pb2.RUN_PHASE_PPO, "online loop, after a roll-back")
        self.state.ended_at, self.state.error = None, ""
        self.state.alarm("training", "")
        await self._persist("online loop", self._loop)
        await self.evaluation.after()

    async def _loop(self) -> None:
        if self.settings.samples_rollouts:
            await self.loop.run(self._prompts(), await asyncio.to_thread(self._tokenizer))
        else:
            await self.loop.watch()

    def job_progress(self) -> JobProgress | None:
        """How far the job of the phase is."""
        name = PHASE_NAMES[self.state.phase]
        jobs = (conductor_pb2.RUN_PHASE_PRETRAIN, conductor_pb2.RUN_PHASE_REWARD_MODEL)
        return self.fleet.job_progress(name) if self.state.phase in jobs else None

    def alarms(self) -> list[str]:
        """What needs a person; empty when all is well."""
        processes = (state.alarm for state in self.fleet.states() if state.alarm)
        return [*self.state.alarms.values(), *processes, *self.roster.alarms]

    async def _phases(self, before_loop: Hook | None) -> None:
        timeout_s = self.settings.conductor.start_timeout_s
        if self.settings.samples_rollouts and self.settings.goes_through("online"):
            await asyncio.to_thread(check_prompts, self._prompts())

        def starting(service: str) -> Coroutine[None, None, None]:
            return self._persist(f"start of {service}", lambda: self.fleet.start(service, timeout_s))

        async with asyncio.TaskGroup() as group:
            group.create_task(self._persist("start of redis", lambda: self.fleet.start_redis(timeout_s)))
            group.create_task(starting("preference"))
        async with asyncio.TaskGroup() as group:
            # Beside the job: reading tens of thousands of lines takes the store some time.
            group.create_task(self._persist("import of judgements", self._import))
            self._enter(conductor_pb2.RUN_PHASE_PRETRAIN, "training the language model")
            group.create_task(self._persist("pretraining", lambda: self.fleet.run_job("pretrain")))
        trains = self.settings.goes_through("reward_model")
        doing = "training the reward model" if trains else "starting generation"
        self._enter(conductor_pb2.RUN_PHASE_REWARD_MODEL, doing)
        async with asyncio.TaskGroup() as group:
            # The engine takes its time to start, and it can serve the base model already.
            group.create_task(starting("generation"))
            if self.settings.goes_through("reward_model"):
                group.create_task(self._persist("training of the reward model", self._train_reward_model))
        if not self.settings.goes_through("online"):
            if serves_reward(self.settings):
                await starting("reward")
                await self._measure()
            return
        unneeded = not self.settings.samples_rollouts and not self.settings.reward.scorers
        services = ("learner",) if unneeded else ("reward", "learner")
        self._enter(conductor_pb2.RUN_PHASE_PPO, f"starting {' and '.join(services)}")
        async with asyncio.TaskGroup() as group:
            for name in services:
                group.create_task(starting(name))
        self.state.doing = "evaluating the base policy"
        await self.evaluation.before()
        if before_loop is not None:
            await before_loop()
        self.state.doing = "online loop" if self.settings.samples_rollouts else "training on judgements"
        self.state.loop_started_at = time.time()
        await self._persist("online loop", self._loop)
        self.state.loop_ended_at = time.time()
        self.state.doing = "evaluating the policy"
        await self.evaluation.after()

    async def _measure(self) -> None:
        """What a run is worth that ends before the online loop: its reward's agreement, and its policy by best-of-n."""
        self.state.doing = "evaluating the policy"
        await self.evaluation.before()
        if self.settings.data.evaluation.best_of is not None:
            await self.evaluation.after()

    async def _persist(self, what: str, step: Hook) -> None:
        """Repeats a step until it has succeeded, with growing pauses and under an alarm, while what ends it may pass."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                await step()
            except Exception as error:
                raise_if_cancelled()
                if self._end_on_failure or not may_pass(error):
                    raise
                reason = _described(root_cause(error))
                self.state.alarm(what, f"{what}: {reason}; it is tried again")
                logger.warning("trying again", extra={"step": what, "reason": reason, "pause_s": pause_s})
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self.state.alarm(what, "")
                return

    async def _lost(self) -> str:
        """Returns why training will not go on, if the run is to end then."""
        while True:
            await asyncio.sleep(POLL_S)
            if not self._end_on_failure:
                continue
            for state in self.fleet.states():
                if state.name == "learner" and state.alarm:
                    return state.alarm
            if self.roster.broken:
                return self.roster.broken
            if self.state.phase == conductor_pb2.RUN_PHASE_FAILED:
                return self.state.alarms.get("learner") or "the learner has given up"

    async def _import(self) -> None:
        imported = 0  # a second try begins anew, and stores nothing twice
        async with internal_channel(self.settings, self.fleet.target("preference")) as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            for source in self.settings.data.judgements:
                imported += await import_judgements(stub, source)
        self.state.imported = imported

    async def _train_reward_model(self) -> None:
        doing = self.state.doing
        async with internal_channel(self.settings, self.fleet.target("preference")) as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            while not await self._has_judgements(stub):
                self.state.doing = (
                    f"waiting for judgements: honed judge import FILE --format trl --run {self.settings.directory}"
                )
                await asyncio.sleep(POLL_S)
        self.state.doing = doing
        await self.fleet.run_job("reward-model")

    async def _has_judgements(self, stub: preference_pb2_grpc.PreferenceServiceAsyncStub) -> bool:
        try:
            stats = await stub.GetStats(preference_pb2.GetStatsRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:  # the launcher starts it again
            logger.info("the preference service does not answer", extra={"reason": error.details()})
            return False
        return any(stats.by_kind.get(kind, 0) for kind in TRAINABLE_KINDS)

    def _tokenizer(self) -> Path:
        """A directory with the policy's tokenizer."""
        local = self.workspace.base_model
        return local if local.exists() else fetch_tokenizer(self.store, self.workspace.conductor / "tokenizer")

    def _prompts(self) -> Path:
        """The prompts to train on.

        Raises:
            FailedPrecondition: the run file names none.
        """
        if self.settings.data.prompts is None:
            raise FailedPrecondition("data.prompts is not set: name JSON lines with `text`, `token_ids` or `messages`")
        return self.settings.data.prompts

    def _enter(self, phase: conductor_pb2.RunPhase.ValueType, doing: str) -> None:
        self.state.enter(phase, doing)
        logger.info("phase", extra={"phase": PHASE_NAMES[phase]})


def _described(error: BaseException) -> str:
    details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    return details or type(error).__name__
