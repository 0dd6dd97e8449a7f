"""A run from its start to its end: services up, language model, reward model, online loop.

Each phase leaves its result behind and is skipped when the result is there: a run that was interrupted, or whose conductor was
killed, goes on where it was. When training ends or fails, the services that were started go on serving.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path

import grpc

from honed.artifacts.reward_models import TRAINED
from honed.artifacts.store import PolicyStore
from honed.artifacts.tokenizer import fetch_tokenizer
from honed.conductor.evaluation import Evaluation
from honed.conductor.fleet import Fleet
from honed.conductor.judgements import import_judgements
from honed.conductor.online import OnlineLoop
from honed.conductor.prompt_file import check_prompts
from honed.conductor.state import PHASE_NAMES, RunState
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, Unavailable, root_cause
from honed.kit.progress import JobProgress, read_progress
from honed.runtime import internal_channel
from honed.v1 import conductor_pb2, preference_pb2, preference_pb2_grpc
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

POLL_S = 1.0
CALL_TIMEOUT_S = 30.0
TRAINABLE_KINDS = ("pairwise", "ranking", "rating")
Hook = Callable[[], Awaitable[None]]


class Run:
    """One run over one fleet of services."""

    def __init__(self, settings: RunSettings, fleet: Fleet, store: PolicyStore) -> None:
        """Starts nothing yet; `settings` have every port chosen."""
        self.settings, self.fleet, self.store = settings, fleet, store
        self.state = RunState()
        self.stopping = asyncio.Event()
        self.again = asyncio.Event()  # the learner went back behind its last update
        self.workspace = Workspace(settings.directory)
        self.loop = OnlineLoop(settings, fleet, self.state)
        self.evaluation = Evaluation(settings, fleet, self.workspace)
        self.kept: Path | None = None  # where a fresh run put people's judgements aside

    async def execute(self, before_loop: Hook | None = None, *, fail_with_learner: bool = False) -> None:
        """Goes through the phases; returns when the learner has made its updates, or the run was stopped.

        However training ends, no service is stopped here.

        Args:
            before_loop: awaited between the start of all services and the first prompt.
            fail_with_learner: whether a learner that has given up ends the run. Otherwise it waits for a person, who may let
                the learner go on.

        Raises:
            HonedError: training failed; the state says so too.
        """
        await self._supervised(self._phases(before_loop), fail_with_learner=fail_with_learner)

    async def _supervised(self, phases: Coroutine[None, None, None], *, fail_with_learner: bool = False) -> None:
        """Runs phases until they end, the run is stopped, or a service that training needs is given up."""
        work = asyncio.ensure_future(phases)
        lost = asyncio.ensure_future(self._lost(fail_with_learner))
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
            self.state.error = str(root_cause(error)) or type(error).__name__
            self.state.alarm("training", f"training failed, serving goes on: {self.state.error}")
            self._enter(conductor_pb2.RUN_PHASE_FAILED, "training failed; what was started goes on serving")
            raise
        finally:
            self.state.ended_at = time.time()
            for task in (lost, stop, work):
                task.cancel()
            await asyncio.gather(work, lost, stop, return_exceptions=True)

    async def stand_by(self) -> None:
        """After training has ended: keeps everything serving until the run is stopped, and trains on after a roll-back.

        Raises:
            HonedError: that training failed.
        """
        while True:
            waiting = [asyncio.ensure_future(event.wait()) for event in (self.stopping, self.again)]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waiting:
                    task.cancel()
            if self.stopping.is_set():
                return
            self.again.clear()
            if self.state.phase == conductor_pb2.RUN_PHASE_FINISHED:
                await self._supervised(self._train_on())

    async def _train_on(self) -> None:
        self._enter(conductor_pb2.RUN_PHASE_PPO, "online loop, after a roll-back")
        self.state.ended_at = None
        await self.loop.run(self._prompts(), await asyncio.to_thread(self._tokenizer))
        await self.evaluation.after()

    def job_progress(self) -> JobProgress | None:
        """How far the job of the phase is."""
        name = PHASE_NAMES[self.state.phase]
        jobs = (conductor_pb2.RUN_PHASE_PRETRAIN, conductor_pb2.RUN_PHASE_REWARD_MODEL)
        return read_progress(self.workspace.progress / f"{name}.json") if self.state.phase in jobs else None

    def alarms(self) -> list[str]:
        """What needs a person; empty when all is well."""
        return [*self.state.alarms.values(), *(state.alarm for state in self.fleet.states() if state.alarm)]

    async def _phases(self, before_loop: Hook | None) -> None:
        timeout_s = self.settings.conductor.start_timeout_s
        prompts = self._prompts()
        await asyncio.to_thread(check_prompts, prompts)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.fleet.start_redis(timeout_s))
            group.create_task(self.fleet.start("preference", timeout_s))
        async with asyncio.TaskGroup() as group:
            # Beside the job: reading tens of thousands of lines takes the store some time.
            group.create_task(self._import())
            self._enter(conductor_pb2.RUN_PHASE_PRETRAIN, "training the language model")
            group.create_task(self.fleet.run_job("pretrain"))
        self._enter(conductor_pb2.RUN_PHASE_REWARD_MODEL, "training the reward model")
        async with asyncio.TaskGroup() as group:
            # The engine takes its time to start, and it can serve the base model already.
            group.create_task(self.fleet.start("generation", timeout_s))
            if self._trains_reward_model():
                group.create_task(self._train_reward_model())
        self._enter(conductor_pb2.RUN_PHASE_PPO, "starting reward and learner")
        async with asyncio.TaskGroup() as group:
            for name in ("reward", "learner"):
                group.create_task(self.fleet.start(name, timeout_s))
        self.state.doing = "evaluating the base policy"
        await self.evaluation.before()
        if before_loop is not None:
            await before_loop()
        self.state.doing = "online loop"
        self.state.loop_started_at = time.time()
        await self.loop.run(prompts, await asyncio.to_thread(self._tokenizer))
        self.state.loop_ended_at = time.time()
        self.state.doing = "evaluating the policy"
        await self.evaluation.after()

    async def _lost(self, fail_with_learner: bool) -> str:
        """Returns the reason when a service that training needs is not started again, or the learner has given up."""
        while True:
            await asyncio.sleep(POLL_S)
            for state in self.fleet.states():
                if state.given_up:
                    return state.alarm
            if fail_with_learner and self.state.phase == conductor_pb2.RUN_PHASE_FAILED:
                return self.state.alarms.get("learner") or "the learner has given up"

    async def _import(self) -> None:
        async with internal_channel(self.settings, self.fleet.target("preference")) as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            for source in self.settings.data.judgements:
                self.state.imported += await import_judgements(stub, source)

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

    def _trains_reward_model(self) -> bool:
        """Whether a scorer reads the reward model that this run trains."""
        return any(scorer.source == TRAINED for scorer in self.settings.reward.scorers)

    def _enter(self, phase: conductor_pb2.RunPhase.ValueType, doing: str) -> None:
        self.state.enter(phase, doing)
        logger.info("phase", extra={"phase": PHASE_NAMES[phase]})
