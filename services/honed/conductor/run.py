"""A run from its start to its end: services up, language model, reward model, online loop.

Each phase leaves its result in the run's directory and is skipped when the result is there: a run that was interrupted, or
whose conductor was killed, goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from honed.artifacts.reward_models import TRAINED
from honed.conductor.admitter import Admitter, Depths
from honed.conductor.judgements import import_judgements
from honed.conductor.launcher import Launcher
from honed.conductor.processes import Processes
from honed.conductor.prompts import PromptSequence, check_prompts
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, Unavailable, root_cause
from honed.kit.progress import JobProgress, read_progress
from honed.kit.wiring import consumer_name, internal_channel, redis_url
from honed.queue.admission import Admission, AdmissionPolicy
from honed.queue.connection import Link, Outage
from honed.queue.keys import STAGES, RunKeys
from honed.queue.lease import Leases
from honed.queue.stats import StageStats
from honed.queue.stream import WorkQueue
from honed.v1 import conductor_pb2, learner_pb2, learner_pb2_grpc, preference_pb2_grpc
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

LEASE_MS = 10_000
JOB_TIMEOUT_S = 24 * 3600.0
Hook = Callable[[], Awaitable[None]]


@dataclass
class RunState:
    """Where the run stands; the service and the display read it."""

    phase: conductor_pb2.RunPhase.ValueType = conductor_pb2.RUN_PHASE_STARTING
    doing: str = "starting services"
    started_at: float = field(default_factory=time.time)
    ended_at: float | None = None
    error: str = ""
    depths: Depths | None = None
    learner: learner_pb2.GetStatusResponse | None = None
    imported: int = 0
    loop_started_at: float | None = None
    loop_ended_at: float | None = None
    admitted: int = 0
    books: Mapping[str, StageStats] = field(default_factory=dict)


class Run:
    """One run on one launcher."""

    def __init__(self, settings: RunSettings, launcher: Launcher, processes: Processes) -> None:
        """Starts nothing yet; `settings` have every port chosen."""
        self.settings, self.launcher, self.processes = settings, launcher, processes
        self.state = RunState()
        self.stopping = asyncio.Event()
        self.place = Workspace(settings.directory)

    async def execute(self, before_loop: Hook | None = None) -> None:
        """Goes through the phases; returns when the learner has done its steps, or the run was stopped.

        Args:
            before_loop: awaited between the start of all services and the first prompt.

        Raises:
            HonedError: a phase failed; the state says so too.
        """
        work = asyncio.ensure_future(self._phases(before_loop))
        failed = asyncio.ensure_future(self.launcher.failed())
        stop = asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait({work, failed, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
                self._enter(conductor_pb2.RUN_PHASE_FINISHED, "done")
            elif failed.done():
                raise Unavailable(failed.result())
            else:
                self._enter(conductor_pb2.RUN_PHASE_STOPPED, "stopped")
        except BaseException as error:
            self.state.error = str(root_cause(error)) or type(error).__name__
            self._enter(conductor_pb2.RUN_PHASE_FAILED, "failed")
            raise
        finally:
            self.state.ended_at = time.time()
            for task in (failed, stop, work):
                task.cancel()
            await asyncio.gather(work, return_exceptions=True)

    def job_progress(self) -> JobProgress | None:
        """How far the job of the phase is."""
        names = {conductor_pb2.RUN_PHASE_PRETRAIN: "pretrain", conductor_pb2.RUN_PHASE_REWARD_MODEL: "reward-model"}
        name = names.get(self.state.phase)
        return read_progress(self.place.progress / f"{name}.json") if name else None

    async def _phases(self, before_loop: Hook | None) -> None:
        timeout = self.settings.conductor.start_timeout_s
        await asyncio.to_thread(check_prompts, self._prompts_file())
        redis = await asyncio.to_thread(self.processes.redis)
        async with asyncio.TaskGroup() as group:
            if redis is not None:
                group.create_task(self.launcher.start(redis, timeout))
            group.create_task(self.launcher.start(self.processes.service("preference"), timeout))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._import())
            self._enter(conductor_pb2.RUN_PHASE_PRETRAIN, "training the language model")
            group.create_task(self.launcher.run_job(self.processes.job("pretrain"), JOB_TIMEOUT_S))
        self._enter(conductor_pb2.RUN_PHASE_REWARD_MODEL, "training the reward model")
        async with asyncio.TaskGroup() as group:
            # The engine takes its time to start, and it can serve the base model already.
            group.create_task(self.launcher.start(self.processes.service("generation"), timeout))
            if self._trains_reward_model():
                group.create_task(self.launcher.run_job(self.processes.job("reward-model"), JOB_TIMEOUT_S))
        self._enter(conductor_pb2.RUN_PHASE_PPO, "starting reward and learner")
        async with asyncio.TaskGroup() as group:
            for name in ("reward", "learner"):
                group.create_task(self.launcher.start(self.processes.service(name), timeout))
        if before_loop is not None:
            self.state.doing = "sampling the base policy"
            await before_loop()
        self.state.doing = "online loop"
        self.state.loop_started_at = time.time()
        await self._loop()
        self.state.loop_ended_at = time.time()

    async def _import(self) -> None:
        async with internal_channel(self.settings, self.settings.preference.target) as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            for source in self.settings.data.judgements:
                self.state.imported += await import_judgements(stub, source)

    async def _loop(self) -> None:
        """Feeds the loop until the learner has done its steps."""
        settings = self.settings
        url = self.processes.redis_url or redis_url(settings)
        keys = RunKeys(settings.run)
        name = consumer_name("conductor")
        # One holder, so that two conductors never feed one run.
        async with (
            Link(url, outage=Outage(settings.queue.outage_s)) as link,
            Leases(link, keys).held("conductor", name, LEASE_MS) as lease,
        ):
            queues = {stage: WorkQueue(link, keys, stage, name) for stage in STAGES}
            admitter = Admitter(
                AdmissionPolicy(settings.learner.batch, settings.learner.max_staleness, settings.conductor.max_in_flight),
                Admission(link, keys),
                lease.claim,
                queues,
                await asyncio.to_thread(self._prompts),
                samples_per_prompt=settings.conductor.samples_per_prompt,
                target=(settings.learner.steps or 1 << 40) * settings.learner.batch,
            )
            finished = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                feeding = group.create_task(admitter.run(finished))
                await self._watch(admitter)
                finished.set()
                await feeding
            await self._drained(admitter)
            self.state.admitted = admitter.position
            self.state.books = {stage: await queue.stats() for stage, queue in queues.items()}

    async def _drained(self, admitter: Admitter) -> None:
        """Waits until the streams are empty: each rollout has then trained, or left for a reason that is counted."""
        end = time.monotonic() + self.settings.conductor.drain_timeout_s
        while (depths := await admitter.depths()).in_flight:
            self.state.depths = depths
            if time.monotonic() > end:
                raise Unavailable(
                    f"the streams were not empty {self.settings.conductor.drain_timeout_s:g} s after the last step "
                    f"({depths}): `honed status` tells which service stands still"
                )
            await asyncio.sleep(0.2)
        self.state.depths = depths

    async def _watch(self, admitter: Admitter) -> None:
        """Follows the learner to the end of its steps, through its restarts."""
        async with internal_channel(self.settings, self.settings.learner.target) as channel:
            stub = learner_pb2_grpc.LearnerServiceStub(channel)
            while True:
                depths = self.state.depths = await admitter.depths()
                self.state.admitted = admitter.position
                if depths.dead > self.settings.conductor.dead_letter_limit:
                    raise FailedPrecondition(
                        f"{depths.dead} prompts and rollouts have become dead letters: `honed dead list` shows the reasons"
                    )
                try:
                    self.state.learner = await stub.GetStatus(learner_pb2.GetStatusRequest(), timeout=5)
                except Exception as error:  # it may be starting again; the launcher knows when to give up
                    logger.info("the learner does not answer", extra={"reason": str(error)})
                else:
                    if self.state.learner.state == learner_pb2.LEARNER_STATE_FINISHED:
                        return
                await asyncio.sleep(0.5)

    def _prompts(self) -> PromptSequence:
        mine = self.settings.conductor
        path = self._prompts_file()
        limits = self.settings.generation
        longest = min(limits.max_prompt_tokens, limits.max_model_tokens - mine.response_tokens)
        return PromptSequence.load(self.settings.run, path, self.place.base_model, self.settings.seed, mine, longest=longest)

    def _prompts_file(self) -> Path:
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
        self.state.phase, self.state.doing = phase, doing
        logger.info("phase", extra={"phase": conductor_pb2.RunPhase.Name(phase)})
