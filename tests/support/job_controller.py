"""What a cluster does with Jobs, on the stand-in of its API: one pod after another, until one succeeds or a rule ends it."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support.cluster import Cluster, Object

PASSING = (75, 134, 137, 139, 143)
JOB = "honed.dev/job"


def cron_job(job: str = "pretrain", image: str = "honed-learner-cpu:1", **spec: Any) -> Object:
    """The template of a job, as the overlays have it."""
    pod = {"restartPolicy": "Never", "containers": [{"name": "job", "image": image, "args": ["job", job]}]}
    labels = {"app.kubernetes.io/name": "honed", "app.kubernetes.io/component": "job", JOB: job}
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": f"honed-{job}", "labels": {"honed.dev/job": job}},
        "spec": {
            "schedule": "0 0 31 2 *",
            "suspend": True,
            "jobTemplate": {
                "metadata": {"labels": labels},
                "spec": {"backoffLimit": 1, "template": {"metadata": {"labels": labels}, "spec": pod}, **spec},
            },
        },
    }


async def add_pod(cluster: Cluster, job: Object, name: str, **status: Any) -> Object:
    """A pod of a Job, with the labels that a Job controller gives it."""
    template = copy.deepcopy(job["spec"]["template"])
    labels = {**template["metadata"]["labels"], "batch.kubernetes.io/job-name": job["metadata"]["name"]}
    metadata = {"name": name, "labels": labels}
    return await cluster.put("pods", {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending", **status}})


async def end_pod(cluster: Cluster, pod: str, code: int, message: str = "", reason: str = "") -> None:
    """Ends a pod's container by itself."""
    number = len(cluster.requests) + len(cluster.all("pods"))
    state = {"exitCode": code, "reason": reason or ("Error" if code else "Completed"), "message": message}
    state["finishedAt"] = f"2026-01-01T01:{number // 60 % 60:02}:{number % 60:02}Z"
    containers = [{"name": "job", "state": {"terminated": state}}]
    await cluster.change("pods", pod, phase="Failed" if code else "Succeeded", containerStatuses=containers)


async def end_job(cluster: Cluster, job: str, kind: str, reason: str = "", message: str = "", **status: Any) -> None:
    """Sets a Job's final condition."""
    condition = {"type": kind, "status": "True", "reason": reason, "message": message}
    await cluster.change("jobs", job, conditions=[condition], **status)


@dataclass
class JobController:
    """Runs the pods of all Jobs.

    Attributes:
        exits: Exit status of one pod after another, of whichever Job; 0 when they are used up.
        ticks: How many times a pod writes its log before it ends.
        ran: The names of all pods that began.
        running: Pods that run now, with their job.
        overlaps: Pods that began while another one of their job ran.
        succeeded: The names of all pods that succeeded.
        publish: Called when a pod succeeds, before anybody knows.
    """

    cluster: Cluster
    exits: list[int] = field(default_factory=list)
    ticks: int = 2
    tick_s: float = 0.002
    ran: list[str] = field(default_factory=list)
    running: dict[str, str] = field(default_factory=dict)
    overlaps: list[str] = field(default_factory=list)
    succeeded: list[str] = field(default_factory=list)
    publish: Callable[[], None] = lambda: None

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._work())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _work(self) -> None:
        seen: set[str] = set()
        async with asyncio.TaskGroup() as group:
            while True:
                for job in self.cluster.all("jobs"):
                    if job["metadata"]["uid"] not in seen and not job["spec"].get("suspend"):
                        seen.add(job["metadata"]["uid"])
                        group.create_task(self._run(job))
                await asyncio.sleep(self.tick_s / 2)

    async def _run(self, job: Object) -> None:
        name, limit = job["metadata"]["name"], job["spec"]["backoffLimit"]
        for failed in itertools.count():
            # Between the look and the pod's creation nothing is awaited: a controller whose view is older than that would
            # start a pod of a deleted Job, which no client of the API can know of.
            if not self._there(job):
                return
            code = await self._pod(job, f"{name}-{job['metadata']['uid'][4:]}-{failed}")
            if not self._there(job):
                return
            if code == 0:
                await end_job(self.cluster, name, "Complete", succeeded=1)
                return
            await self.cluster.change("jobs", name, failed=failed + 1)
            if not self._there(job):
                return
            if code not in PASSING:
                message = f"Container job failed with exit code {code} matching FailJob rule at index 2"
                await end_job(self.cluster, name, "Failed", "PodFailurePolicy", message)
                return
            if failed >= limit:
                message = "Job has reached the specified backoff limit"
                await end_job(self.cluster, name, "Failed", "BackoffLimitExceeded", message)
                return

    async def _pod(self, job: Object, pod: str) -> int:
        of = job["spec"]["template"]["metadata"]["labels"][JOB]
        await add_pod(self.cluster, job, pod, phase="Running")
        if of in self.running.values():
            self.overlaps.append(pod)
        self.ran.append(pod)
        self.running[pod] = of
        for tick in range(self.ticks):
            self.cluster.logs[pod] = self.cluster.logs.get(pod, "") + f"tick {tick}\n"
            await asyncio.sleep(self.tick_s)
        code = self.exits.pop(0) if self.exits else 0
        del self.running[pod]
        if code == 0:
            self.publish()
            self.succeeded.append(pod)
        await end_pod(self.cluster, pod, code)
        return code

    def _there(self, job: Object) -> bool:
        found = self.cluster.object("jobs", job["metadata"]["name"])
        return found is not None and found["metadata"]["uid"] == job["metadata"]["uid"]
