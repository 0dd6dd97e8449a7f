"""The training jobs of a run as Jobs of a cluster.

What holds:
    * One Job at a time has a template's digest, and an attempt is made only once the one before has failed for a reason that
      may pass. Its name is the same whoever makes it, so a conductor that starts again, or a second one, follows what is there.
    * A Job is made suspended, and let run once nothing of an earlier one runs. Looked at before, that could change until the
      Job is there: another conductor's was made, ran, and was deleted meanwhile.
    * A Job that is deleted is made again. One of an older template is deleted, also while it is followed, and one that a person
      has made of the template is waited for: two of the same job would write the same result.
    * A job whose result stands in the store is not started, so that a conductor that starts again needs no room for it.
    * However long the API server is away, only the Job's own end ends the wait. What is waited for is an alarm after
      `conductor.start_timeout_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from honed.conductor.cluster import outcome
from honed.conductor.cluster.api import CRON_JOBS, JOBS, PODS, Api, ApiUnavailable, Object
from honed.conductor.cluster.patience import Patience
from honed.conductor.cluster.template import (
    JOB,
    RELEASED,
    TEMPLATE,
    JobTemplate,
    attempt_of,
    generation_of,
    labels_of,
    released,
)
from honed.conductor.launcher import ProcessState
from honed.conductor.logs import last_lines, plain
from honed.conductor.results import Results
from honed.config import RunSettings
from honed.kit.aio import background
from honed.kit.errors import Conflict, FailedPrecondition, HonedError, NotFound, may_pass
from honed.kit.progress import JobProgress, logged_progress

logger = logging.getLogger(__name__)

WATCH_S = 30.0
SHORTEST_WATCH_S = 1.0
LOOK_EVERY_S = 5.0
LOG_LINES = 100
_JOB_OF_POD = "batch.kubernetes.io/job-name"


@dataclass
class _Following:
    """What is known of a job.

    Attributes:
        state: For `honed status`.
        progress: What its log told last.
        log: The end of its log when it was last read.
        alarms: By what they come from.
    """

    state: ProcessState
    progress: JobProgress | None = None
    log: str = ""
    alarms: dict[str, str] = field(default_factory=dict)

    def alarm(self, source: str, text: str) -> None:
        """Raises the alarm of a source, or ends it when `text` is empty."""
        self.alarms[source] = text
        self.state.alarm = "; ".join(filter(None, self.alarms.values()))


class _Obsolete(Exception):
    """A Job that waits to be let run need not: the result is there, or another conductor has made one of a newer template."""


class KubernetesJobs:
    """Starts and follows Jobs made from the suspended CronJobs `honed-pretrain` and `honed-reward-model`."""

    def __init__(self, api: Api, settings: RunSettings, results: Results, clock: Callable[[], float] = time.monotonic) -> None:
        """Asks for nothing yet; `clock` gives seconds."""
        self._api, self._settings, self._results, self._clock = api, settings, results, clock
        self._following: dict[str, _Following] = {}

    async def run_job(self, job: str) -> None:
        """See `JobLauncher`; returns at once if the result is there and no Job of the template is."""
        following = self._following[job] = _Following(ProcessState(job))
        patience = Patience(partial(following.alarm, "cluster"), self._settings.conductor.start_timeout_s, self._clock)
        while True:
            template = await patience.until(lambda: self._template(job))
            name = await patience.until(partial(self._chosen, template, following))
            if name is None:
                break
            logger.info("following a job", extra={"job": name})
            async with background(self._observed(name, following)):
                succeeded = await self._followed(name, template, following, patience)
            if succeeded:
                await self._check_result(job, name)
                break
            logger.warning("a job was deleted, or its template has changed; it is started again", extra={"job": name})
            await patience.failed(ApiUnavailable(f"job {name} is gone, and is made again"))
        del self._following[job]

    def progress(self, job: str) -> JobProgress | None:
        """See `JobLauncher`."""
        following = self._following.get(job)
        return following.progress if following is not None else None

    def states(self) -> list[ProcessState]:
        """See `JobLauncher`."""
        return [following.state for following in self._following.values()]

    async def _template(self, job: str) -> JobTemplate:
        name = f"honed-{job}"
        try:
            cron_job = await self._api.get(CRON_JOBS, name)
        except NotFound:
            raise ApiUnavailable(
                f"namespace {self._api.namespace} has no CronJob {name}, which holds the template of the job: apply an overlay"
            ) from None
        if not cron_job["spec"].get("suspend"):
            logger.warning("a CronJob that holds a template is not suspended: it starts jobs too", extra={"cron_job": name})
        return JobTemplate(self._settings.run, job, cron_job)

    async def _chosen(self, template: JobTemplate, following: _Following) -> str | None:
        """The name of the Job to follow, which is started if there is none; None if the result is there and none runs.

        Raises:
            FailedPrecondition: It has failed by itself, or the API refuses the template.
            ApiUnavailable: Also while something of a deleted Job is left.
        """
        found = await self._api.find(JOBS, labels={TEMPLATE: template.digest})
        last = max(found.items, key=attempt_of, default=None)
        if last is None:
            if not await self._results.lacking(template.job):
                return None
            return await self._started(template, 1)
        name, stands = str(last["metadata"]["name"]), outcome.verdict(last)
        if stands.kind == "complete":
            return name
        if last["metadata"].get("deletionTimestamp"):
            raise ApiUnavailable(f"job {name} is being deleted, and is started again after that")
        if stands.kind == "active":
            return name
        failed = await self._failure(last, following)
        if not may_pass(failed):
            raise failed
        if not await self._results.lacking(template.job):
            return None
        return await self._started(template, attempt_of(last) + 1)

    async def _started(self, template: JobTemplate, attempt: int) -> str:
        name = template.name(attempt)
        # Another conductor may have been faster, or an answer was lost; or a quota changed meanwhile, and the Job is not there.
        with contextlib.suppress(Conflict):
            await self._api.create(JOBS, template.made(attempt, self._settings.conductor.kubernetes.job_deadline_s))
            logger.info("started a job", extra={"job": name})
        return name

    async def _followed(self, name: str, template: JobTemplate, following: _Following, patience: Patience) -> bool:
        """Returns True when the Job has succeeded, False when it is gone or need not run.

        Raises:
            Unavailable: It failed for a reason that may pass.
            DeadlineExceeded: It took too long.
            FailedPrecondition: It failed by itself.
        """
        while True:
            try:
                listing = await self._api.find(JOBS, name=name)
                if not listing.items:
                    return False
                if await self._succeeded(listing.items[0], template, following):
                    return True
                if await self._has_changed(template):
                    return False
                patience.answered()
                began = self._clock()
                async with aclosing(self._api.watch(JOBS, name, listing.version, WATCH_S)) as events:
                    async for event in events:
                        if event.kind == "DELETED":
                            return False
                        if await self._succeeded(event.object, template, following):
                            return True
                if self._clock() - began < SHORTEST_WATCH_S:
                    raise ApiUnavailable("a watch of the API ended as soon as it began")
            except _Obsolete:
                return False
            except ApiUnavailable as error:
                await patience.failed(error)

    async def _has_changed(self, template: JobTemplate) -> bool:
        """Whether somebody has changed the CronJob since: corrected an image that cannot be pulled, say."""
        try:
            cron_job = await self._api.get(CRON_JOBS, f"honed-{template.job}")
        except NotFound:  # its Jobs go on without it
            return False
        return JobTemplate(self._settings.run, template.job, cron_job).digest != template.digest

    async def _succeeded(self, job: Object, template: JobTemplate, following: _Following) -> bool:
        if labels_of(job).get(TEMPLATE) != template.digest:
            name = job["metadata"]["name"]
            raise FailedPrecondition(f"there is a job {name} that no conductor has made: kubectl delete job {name}")
        await self._let_run(job, template)
        following.state.restarts = int((job.get("status") or {}).get("failed") or 0)
        stands = outcome.verdict(job)
        if stands.kind == "failed":
            raise await self._failure(job, following)
        return stands.kind == "complete"

    async def _let_run(self, job: Object, template: JobTemplate) -> None:
        """Lets a Job run that is as it was made. One that a person has suspended since stays so.

        Raises:
            _Obsolete: It has nothing to do any more.
            ApiUnavailable: Also while something of an earlier Job runs.
        """
        if not job["spec"].get("suspend") or RELEASED in (job["metadata"].get("annotations") or {}):
            return
        await self._end_older(template)
        pods = (await self._api.find(PODS, labels={JOB: template.job})).items
        if left := [pod["metadata"]["name"] for pod in pods if not outcome.ended(pod)]:
            raise ApiUnavailable(f"pods of an earlier job still run, and are waited for: {', '.join(sorted(left))}")
        wanted = await self._results.lacking(template.job)  # if not, an older one has succeeded meanwhile
        # Somebody else was faster, or it is gone. Its successor of the same name is of another version.
        with contextlib.suppress(Conflict, NotFound):
            if wanted:
                await self._api.replace(JOBS, released(job))
            else:
                await self._api.delete(JOBS, job)
        if not wanted:
            raise _Obsolete

    async def _end_older(self, template: JobTemplate) -> None:
        """Deletes the Jobs of older templates that have yet to end.

        Raises:
            _Obsolete: There is a newer template's.
            ApiUnavailable: Also until they are gone.
        """
        jobs = (await self._api.find(JOBS, labels={JOB: template.job})).items
        made = [(generation, job) for job in jobs if (generation := generation_of(job, template)) is not None]
        if any(generation > template.generation for generation, _ in made):
            raise _Obsolete
        active = (job for generation, job in made if generation < template.generation and outcome.verdict(job).kind == "active")
        older = {str(job["metadata"]["name"]): job for job in active}
        for name, job in older.items():
            if not job["metadata"].get("deletionTimestamp"):
                logger.warning("a job of an older template is deleted", extra={"job": name})
                with contextlib.suppress(Conflict, NotFound):
                    await self._api.delete(JOBS, job)
        if older:
            raise ApiUnavailable(f"jobs of an older template are being deleted, and are waited for: {', '.join(sorted(older))}")

    async def _failure(self, job: Object, following: _Following) -> HonedError:
        """Why a Job failed, with the end of its log."""
        name = str(job["metadata"]["name"])
        last = outcome.last_exit(await self._pods(name))
        log = following.log
        if last is not None:
            with contextlib.suppress(HonedError):  # gone, or the node does not answer: what was read last has to do
                log = await self._log(last.pod, last.container) if last.container else log
        following.state.ready = False
        following.state.last_exit = last.text if last else outcome.verdict(job).reason
        return outcome.failure(name, outcome.verdict(job), last, log)

    async def _observed(self, name: str, following: _Following) -> NoReturn:
        """Keeps what people are shown up to date, as far as the API serves."""
        started = self._clock()
        while True:
            pause_s = LOOK_EVERY_S
            try:
                await self._look(name, following, late=self._clock() - started > self._settings.conductor.start_timeout_s)
            except ApiUnavailable as error:
                pause_s = max(pause_s, error.retry_after_s or 0.0)
                logger.info("a job is not looked at", extra={"job": name, "reason": str(error)})
            except HonedError as error:  # a pod that has gone, or whose container has yet to begin
                logger.info("a job is not looked at", extra={"job": name, "reason": str(error)})
            await asyncio.sleep(pause_s)

    async def _look(self, name: str, following: _Following, *, late: bool) -> None:
        pods = await self._pods(name)
        pod, state = outcome.newest(pods), following.state
        state.ready = pod is not None and outcome.runs(pod)
        if (last := outcome.last_exit(pods)) is not None:
            said = last.message.strip().splitlines()
            state.last_exit = f"{last.text}: {said[-1]}" if said else last.text
        waits = outcome.waits_for(pod) if pod is not None else f"it has no pod: `kubectl describe job {name}` says why"
        following.alarm("pod", f"job {name} does not run: {waits}" if late and waits and not state.ready else "")
        if pod is not None and state.ready:
            following.log = await self._log(pod["metadata"]["name"], outcome.main_container(pod))
            told = [progress for line in following.log.splitlines() if (progress := logged_progress(line))]
            following.progress = told[-1] if told else following.progress
            state.log_tail = [plain(line) for line in last_lines(following.log)]

    async def _pods(self, name: str) -> list[Object]:
        return (await self._api.find(PODS, labels={_JOB_OF_POD: name})).items

    async def _log(self, pod: str, container: str) -> str:
        return await self._api.log(pod, container, LOG_LINES)

    async def _check_result(self, job: str, name: str) -> None:
        if lack := await self._results.lacking(job):
            raise FailedPrecondition(
                f"job {name} has succeeded, and {lack}: its pods and the conductor must share policy.url; if the store was "
                f"emptied since, delete the job and restart the conductor: kubectl delete job {name}"
            )
