"""Claims about the jobs of a run as Jobs of a cluster, over a stand-in of its API."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import Cluster, Fault, Object
from tests.support.cluster_run import api_of, jobs_of, publish_base, settings_of
from tests.support.job_controller import JobController, add_pod, cron_job, end_job, end_pod
from tests.support.run import until

from honed.artifacts.store import PolicyStore
from honed.conductor.cluster import patience
from honed.conductor.cluster.api import Api
from honed.conductor.cluster.jobs import KubernetesJobs
from honed.conductor.results import Results
from honed.kit.errors import DeadlineExceeded, FailedPrecondition, HonedError, Unavailable
from honed.kit.log import JsonFormatter
from honed.kit.progress import JobProgress

SECRET = 'pod one-x: job: CreateContainerConfigError: secret "honed-token-learner" not found'

SUSPENDED: Object = {"spec": {"suspend": True}}


def on(verb: str, resource: str) -> Any:
    return lambda asked, of: (asked, of) == (verb, resource)


@asynccontextmanager
async def running(jobs: KubernetesJobs, job: str = "pretrain") -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(jobs.run_job(job))
    await asyncio.sleep(0)  # so that it has a state
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def started(cluster: Cluster) -> Object:
    """The one Job that there is, once it may run."""
    await until(lambda: any(not job["spec"]["suspend"] for job in cluster.all("jobs")), 60, "a Job that may run")
    [job] = cluster.all("jobs")
    return job


async def followed(cluster: Cluster) -> str:
    """The name of the one Job, once it is watched."""
    name = str((await started(cluster))["metadata"]["name"])
    watches = cluster.asked("watch", "jobs")
    await until(lambda: cluster.asked("watch", "jobs") > watches, 60, "a watch")
    return name


async def within(task: asyncio.Task[None], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        await task


@pytest.fixture
async def template(cluster: Cluster) -> Object:
    return await cluster.put("cronjobs", cron_job())


async def test_a_job_is_made_from_its_template_and_ends_with_its_success(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    async with running(jobs_of(tmp_path, api)) as task:
        job = await started(cluster)
        name, spec = job["metadata"]["name"], job["spec"]
        assert name.startswith("honed-pretrain-small-")
        assert name.endswith("-1")
        [owner] = job["metadata"]["ownerReferences"]
        assert owner == {
            "apiVersion": "batch/v1", "kind": "CronJob", "name": "honed-pretrain", "uid": template["metadata"]["uid"]
        }  # fmt: skip
        labels = job["metadata"]["labels"]
        digest = labels.pop("honed.dev/template")
        assert digest in name
        assert labels == {
            "app.kubernetes.io/name": "honed",
            "app.kubernetes.io/component": "job",
            "honed.dev/job": "pretrain",
            "honed.dev/attempt": "1",
        }
        job["metadata"]["annotations"].pop("honed.dev/released", None)  # it is let run in the next moment
        assert job["metadata"]["annotations"] == {
            "honed.dev/run": "small",
            "honed.dev/generation": "1",
            "cronjob.kubernetes.io/instantiate": "manual",
        }
        assert (spec["ttlSecondsAfterFinished"], spec["activeDeadlineSeconds"]) == (86_400, 86_400)
        pods = spec["template"]
        assert pods["spec"] == template["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        assert pods["metadata"]["labels"]["honed.dev/template"] == digest
        await until(lambda: not (cluster.object("jobs", name) or {})["spec"]["suspend"], 60, "the job may run")
        publish_base(tmp_path)
        await end_job(cluster, name, "Complete")
        await within(task)


async def test_a_job_that_a_person_suspends_stays_suspended(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    async with running(jobs_of(tmp_path, api)) as task:
        name = (await started(cluster))["metadata"]["name"]
        await until(lambda: not (cluster.object("jobs", name) or {})["spec"]["suspend"], 60, "the job may run")
        job = cluster.object("jobs", name) or {}
        await cluster.put("jobs", {**job, "spec": {**job["spec"], "suspend": True}})
        asked = cluster.asked("list", "jobs")
        async with running(jobs_of(tmp_path, api)):  # a conductor that starts again
            await until(lambda: cluster.asked("list", "jobs") > asked + 1, 60, "it was looked at")
        assert (cluster.object("jobs", name) or {})["spec"]["suspend"] is True
        publish_base(tmp_path)
        await end_job(cluster, name, "Complete")
        await within(task)


async def test_what_the_template_says_of_time_holds(tmp_path: Path, cluster: Cluster, api: Api) -> None:
    await cluster.put("cronjobs", cron_job(activeDeadlineSeconds=60, ttlSecondsAfterFinished=5))
    async with running(jobs_of(tmp_path, api)):
        spec = (await started(cluster))["spec"]
        assert (spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) == (60, 5)


async def test_a_job_whose_result_stands_is_not_started(tmp_path: Path, cluster: Cluster, api: Api, template: Object) -> None:
    publish_base(tmp_path)
    await jobs_of(tmp_path, api).run_job("pretrain")
    assert cluster.all("jobs") == []


async def test_a_success_without_a_result_is_an_error_and_starts_nothing(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    async with running(jobs_of(tmp_path, api)) as task:
        name = await followed(cluster)
        await end_job(cluster, name, "Complete")
        with pytest.raises(FailedPrecondition, match=r"has succeeded, and the policy store .* holds no version 0\.0") as raised:
            await within(task)
    assert f"kubectl delete job {name}" in str(raised.value)
    with pytest.raises(FailedPrecondition, match="has succeeded"):
        await jobs_of(tmp_path, api).run_job("pretrain")
    assert cluster.asked("create", "jobs") == 1


async def test_without_its_template_a_job_is_waited_for_under_an_alarm(tmp_path: Path, cluster: Cluster, api: Api) -> None:
    jobs = jobs_of(tmp_path, api, start_timeout_s=0.02)
    async with running(jobs):
        await until(lambda: jobs.states()[0].alarm, 60, "the alarm")
        assert "namespace tests has no CronJob honed-pretrain" in jobs.states()[0].alarm
        await cluster.put("cronjobs", cron_job())
        await started(cluster)
        await until(lambda: "CronJob" not in jobs.states()[0].alarm, 60, "the alarm ends")


async def test_a_template_that_the_cluster_refuses_is_an_error(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    cluster.faults = [Fault("refused", 422, matches=on("create", "jobs"))]
    with pytest.raises(FailedPrecondition, match="the API server refuses this: it hurts"):
        await jobs_of(tmp_path, api).run_job("pretrain")


@pytest.mark.parametrize(("status", "times"), [(403, 3), (404, 3), (409, 3), (500, 2), (429, 2)])
async def test_a_job_that_cannot_be_made_now_is_made_later(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object, status: int, times: int
) -> None:
    """403 is a quota that is used up, 409 one that changed at the same moment."""
    cluster.faults = [Fault("refused", status, matches=on("create", "jobs")) for _ in range(times)]
    async with running(jobs_of(tmp_path, api)) as task:
        name = (await started(cluster))["metadata"]["name"]
        publish_base(tmp_path)
        await end_job(cluster, name, "Complete")
        await within(task)
    assert cluster.asked("create", "jobs") == times + 1


async def test_a_retry_comes_no_sooner_than_the_server_asks(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    cluster.faults = [Fault("refused", 429, "1", on("get", "cronjobs"))]
    began = time.monotonic()
    async with running(jobs_of(tmp_path, api)):
        await started(cluster)
    assert 1.0 <= time.monotonic() - began < 5.0


async def test_a_conductor_that_starts_again_follows_what_is_there(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    async with running(jobs_of(tmp_path, api)):
        name = await followed(cluster)
    async with running(jobs_of(tmp_path, api)) as again:
        assert await followed(cluster) == name
        publish_base(tmp_path)
        await end_job(cluster, name, "Complete")
        await within(again)
    await jobs_of(tmp_path, api).run_job("pretrain")
    assert cluster.asked("create", "jobs") == 1


async def test_of_two_conductors_at_once_one_makes_the_job_and_both_follow_it(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    async with (
        api_of(tmp_path, cluster) as other,
        running(jobs_of(tmp_path, api)) as one,
        running(jobs_of(tmp_path, other)) as two,
    ):
        job = await started(cluster)
        await until(lambda: cluster.asked("watch", "jobs") >= 2, 60, "both watch")
        publish_base(tmp_path)
        await end_job(cluster, job["metadata"]["name"], "Complete")
        await within(one)
        await within(two)
    assert len(cluster.all("jobs")) == 1


async def test_what_a_newer_api_server_fills_into_a_template_starts_nothing_anew(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    async with running(jobs_of(tmp_path, api)):
        await started(cluster)
    filled = cluster.object("cronjobs", "honed-pretrain") or {}
    filled["spec"]["jobTemplate"]["spec"]["podReplacementPolicy"] = "TerminatingOrFailed"
    await cluster.put("cronjobs", filled, defaults=True)
    async with running(jobs_of(tmp_path, api)) as task:
        [job] = cluster.all("jobs")
        publish_base(tmp_path)
        await end_job(cluster, job["metadata"]["name"], "Complete")
        await within(task)
    assert len(cluster.all("jobs")) == 1


async def test_a_job_of_an_older_template_is_deleted_and_the_new_one_runs_once_its_pods_have_ended(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    async with running(jobs_of(tmp_path, api)):
        old = await started(cluster)
        await add_pod(cluster, old, "old-x", phase="Running")
    await cluster.put("cronjobs", cron_job(image="honed-learner-cpu:2"))
    jobs = jobs_of(tmp_path, api, start_timeout_s=0.02)
    async with running(jobs) as task:
        await until(lambda: cluster.object("jobs", old["metadata"]["name"]) is None, 60, "the old one is deleted")
        await until(lambda: "pods of an earlier job still run" in jobs.states()[0].alarm, 60, "the alarm")
        [new] = cluster.all("jobs")
        assert new["spec"]["suspend"] is True
        await end_pod(cluster, "old-x", 143)
        name = (await started(cluster))["metadata"]["name"]
        publish_base(tmp_path)
        await end_job(cluster, name, "Complete")
        await within(task)
    assert cluster.asked("delete", "jobs") == 1


async def test_a_template_that_is_corrected_while_its_job_is_followed_replaces_the_job(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    """Its image cannot be pulled, say: nobody restarts the conductor for that."""
    async with running(jobs_of(tmp_path, api)) as task:
        name = await followed(cluster)
        await cluster.put("cronjobs", cron_job(image="honed-learner-cpu:2"))
        await until(lambda: cluster.object("jobs", name) is None, 60, "the older one is deleted")
        corrected = await started(cluster)
        assert corrected["spec"]["template"]["spec"]["containers"][0]["image"] == "honed-learner-cpu:2"
        publish_base(tmp_path)
        await end_job(cluster, corrected["metadata"]["name"], "Complete")
        await within(task)


async def test_a_job_goes_on_when_its_template_is_deleted(tmp_path: Path, cluster: Cluster, api: Api, template: Object) -> None:
    async with running(jobs_of(tmp_path, api)) as task:
        name = await followed(cluster)
        await cluster.delete("cronjobs", "honed-pretrain")
        watches = cluster.asked("watch", "jobs")
        await until(lambda: cluster.asked("watch", "jobs") > watches + 1, 60, "it is followed further")
        publish_base(tmp_path)
        await end_job(cluster, name, "Complete")
        await within(task)


async def test_who_has_an_older_template_takes_the_newer_one(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    """Another conductor has seen the change first, and its Job is there when this one wants its own to run."""
    blocking = cron_job()["spec"]["jobTemplate"]["spec"]["template"]
    by_hand = {"metadata": {"name": "by-hand"}, "spec": {"template": blocking}}
    await add_pod(cluster, by_hand, "by-hand-x", phase="Running")
    async with running(jobs_of(tmp_path, api)) as task:
        await until(lambda: cluster.all("jobs"), 60, "a Job")
        [stale] = cluster.all("jobs")
        await cluster.put("cronjobs", cron_job(image="honed-learner-cpu:2"))
        async with api_of(tmp_path, cluster) as other, running(jobs_of(tmp_path, other)) as second:
            await until(lambda: cluster.object("jobs", stale["metadata"]["name"]) is None, 60, "the older one is gone")
            await end_pod(cluster, "by-hand-x", 0)
            name = (await started(cluster))["metadata"]["name"]
            publish_base(tmp_path)
            await end_job(cluster, name, "Complete")
            await within(task)
            await within(second)
    assert len(cluster.all("jobs")) == 1


async def test_a_job_that_another_conductor_let_run_meanwhile_is_not_deleted_for_the_result_that_it_left(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    """What was read of the Job is old by the time at which its result is seen."""

    class SlowStore(Results):
        asked = 0

        async def lacking(self, job: str) -> str:
            self.asked += 1
            if self.asked == 2:  # the first time there was no Job yet
                [made] = cluster.all("jobs")
                await cluster.put("jobs", {**made, "spec": {**made["spec"], "suspend": False}})
                publish_base(tmp_path)
                await end_job(cluster, made["metadata"]["name"], "Complete")
            return await super().lacking(job)

    settings = settings_of(tmp_path)
    store = SlowStore(settings, PolicyStore(settings.policy_url, settings.run))
    async with running(KubernetesJobs(api, settings, store)) as task:
        await within(task)
    assert cluster.asked("delete", "jobs") == 1
    [job] = cluster.all("jobs")
    assert job["spec"]["suspend"] is False


async def test_a_job_that_outlived_its_cron_job_is_neither_newer_nor_older(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    """A CronJob that is made anew counts its generations from the beginning."""
    for image in ("2", "3"):
        await cluster.put("cronjobs", cron_job(image=f"honed-learner-cpu:{image}"))
    async with running(jobs_of(tmp_path, api)):
        left = (await started(cluster))["metadata"]["name"]
    await cluster.delete("cronjobs", "honed-pretrain")
    await cluster.put("cronjobs", cron_job(image="honed-learner-cpu:4"))
    async with running(jobs_of(tmp_path, api)) as task:
        await until(lambda: sum(not job["spec"]["suspend"] for job in cluster.all("jobs")) == 2, 60, "the new one may run")
        [new] = [job["metadata"]["name"] for job in cluster.all("jobs") if job["metadata"]["name"] != left]
        publish_base(tmp_path)
        await end_job(cluster, new, "Complete")
        await within(task)
    assert cluster.asked("delete", "jobs") == 0


async def test_a_job_that_a_person_made_of_the_template_is_waited_for_and_its_result_taken(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    by_hand = {"metadata": {"name": "by-hand"}, "spec": template["spec"]["jobTemplate"]["spec"]}
    await add_pod(cluster, by_hand, "by-hand-x", phase="Running")
    jobs = jobs_of(tmp_path, api, start_timeout_s=0.02)
    async with running(jobs) as task:
        await until(lambda: "by-hand-x" in jobs.states()[0].alarm, 60, "the alarm")
        publish_base(tmp_path)
        await end_pod(cluster, "by-hand-x", 0)
        await within(task)
    assert cluster.all("jobs") == [], "the one that waited need not run"


async def test_a_job_that_vanishes_again_and_again_is_made_with_growing_pauses(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 10.0)
    cluster.faults = [Fault("refused", 409, matches=on("create", "jobs")) for _ in range(1000)]
    async with running(jobs_of(tmp_path, api)):
        await asyncio.sleep(1.5)
    assert 2 <= cluster.asked("create", "jobs") <= 10


async def test_a_job_that_nobody_here_made_is_not_taken_for_ours(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    async with running(jobs_of(tmp_path, api)):
        job = await started(cluster)
    await cluster.delete("jobs", job["metadata"]["name"])
    del job["metadata"]["labels"]
    await cluster.put("jobs", job)
    with pytest.raises(FailedPrecondition, match=f"kubectl delete job {job['metadata']['name']}"):
        await jobs_of(tmp_path, api).run_job("pretrain")


async def test_a_job_that_is_deleted_is_started_again_once_nothing_of_it_runs(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    jobs = jobs_of(tmp_path, api, start_timeout_s=0.05)
    async with running(jobs) as task:
        name = await followed(cluster)
        pod = await add_pod(cluster, (await started(cluster)), "one-x", phase="Running")
        await cluster.delete("jobs", name)
        await until(lambda: "pods of an earlier job still run" in jobs.states()[0].alarm, 60, "the alarm")
        assert "one-x" in jobs.states()[0].alarm
        [successor] = cluster.all("jobs")
        assert (successor["metadata"]["name"], successor["spec"]["suspend"]) == (name, True)
        await end_pod(cluster, pod["metadata"]["name"], 143)
        await until(lambda: not (cluster.object("jobs", name) or {})["spec"]["suspend"], 60, "it may run")
        publish_base(tmp_path)
        await end_job(cluster, name, "Complete")
        await within(task)


async def test_a_job_that_is_being_deleted_is_started_again_when_it_is_gone(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    async with running(jobs_of(tmp_path, api)):
        job = await started(cluster)
    job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    await cluster.put("jobs", job)
    jobs = jobs_of(tmp_path, api, start_timeout_s=0.02)
    async with running(jobs):
        await until(lambda: "is being deleted" in jobs.states()[0].alarm, 60, "the alarm")
        await cluster.delete("jobs", job["metadata"]["name"])
        await until(lambda: cluster.asked("create", "jobs") == 2, 60, "it is started again")


async def failed(cluster: Cluster, *, code: int, reason: str, message: str = "", why: str = "", log: str = "") -> str:
    """Lets the Job that is followed fail; returns its name."""
    name = await followed(cluster)
    await add_pod(cluster, await started(cluster), "one-x", phase="Running")
    cluster.logs["one-x"] = log
    if code:
        await end_pod(cluster, "one-x", code, message, why)
    else:
        await cluster.change("pods", "one-x", phase="Failed", reason="Evicted", message="The node was low on memory.")
    await end_job(cluster, name, "Failed", reason, "it hurts", failed=1)
    return name


@pytest.mark.parametrize(
    ("code", "reason", "kind", "text"),
    [
        (1, "PodFailurePolicy", FailedPrecondition, "exit code 1; PodFailurePolicy: it hurts"),
        (1, "BackoffLimitExceeded", FailedPrecondition, "exit code 1; BackoffLimitExceeded: it hurts"),
        (75, "BackoffLimitExceeded", Unavailable, "exit code 75; BackoffLimitExceeded: it hurts"),
        (137, "BackoffLimitExceeded", Unavailable, "OOMKilled, exit code 137; BackoffLimitExceeded: it hurts"),
        (143, "BackoffLimitExceeded", Unavailable, "exit code 143; BackoffLimitExceeded: it hurts"),
        (139, "BackoffLimitExceeded", Unavailable, "exit code 139; BackoffLimitExceeded: it hurts"),
        (255, "PodFailurePolicy", FailedPrecondition, "exit code 255; PodFailurePolicy: it hurts"),
        (0, "BackoffLimitExceeded", Unavailable, "Evicted: The node was low on memory.; BackoffLimitExceeded: it hurts"),
        (143, "DeadlineExceeded", DeadlineExceeded, "exit code 143; DeadlineExceeded: it hurts"),
    ],
)
async def test_a_failure_says_why_with_the_end_of_the_log_and_whether_another_try_may_succeed(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object, code: int, reason: str, kind: type[HonedError], text: str
) -> None:
    jobs = jobs_of(tmp_path, api)
    async with running(jobs) as task:
        lines = "".join(f"line {n}\n" for n in range(20)) + "honed: the store does not answer\n"
        name = await failed(cluster, code=code, reason=reason, why="OOMKilled" if code == 137 else "", log=lines)
        with pytest.raises(kind) as raised:
            await within(task)
    assert str(raised.value).startswith(f"job {name} failed ({text})")
    if code:
        assert "the end of the log of pod one-x:\nline 13\n" in str(raised.value)
        assert "honed: the store does not answer" in str(raised.value)
    [state] = jobs.states()
    assert (state.name, state.ready, state.restarts) == ("pretrain", False, 1)
    assert text.startswith(state.last_exit.partition(": line")[0])


async def test_where_the_log_is_gone_the_containers_last_words_are_told(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    async with running(jobs_of(tmp_path, api)) as task:
        name = await followed(cluster)
        await add_pod(cluster, await started(cluster), "one-x")
        await end_pod(cluster, "one-x", 1, "honed: data.texts: there are no texts\n")
        await end_job(cluster, name, "Failed", "PodFailurePolicy", "it hurts")
        with pytest.raises(FailedPrecondition, match=r"of pod one-x:\nhoned: data\.texts: there are no texts"):
            await within(task)


async def test_what_failed_for_a_reason_that_may_pass_is_tried_again_by_a_job_of_its_own(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    jobs = jobs_of(tmp_path, api)
    async with running(jobs) as task:
        first = await failed(cluster, code=75, reason="BackoffLimitExceeded")
        with pytest.raises(Unavailable):
            await within(task)
    async with running(jobs) as task:
        second = first.removesuffix("-1") + "-2"
        await until(lambda: not (cluster.object("jobs", second) or SUSPENDED)["spec"]["suspend"], 60, "the second may run")
        publish_base(tmp_path)
        await end_job(cluster, second, "Complete")
        await within(task)
    assert {job["metadata"]["name"] for job in cluster.all("jobs")} == {first, second}
    await jobs_of(tmp_path, api).run_job("pretrain")
    assert len(cluster.all("jobs")) == 2


async def test_what_failed_by_itself_is_not_tried_again_until_its_job_is_deleted(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    async with running(jobs_of(tmp_path, api)) as task:
        name = await failed(cluster, code=1, reason="PodFailurePolicy")
        with pytest.raises(FailedPrecondition):
            await within(task)
    with pytest.raises(FailedPrecondition, match=f"kubectl delete job {name}"):
        await jobs_of(tmp_path, api).run_job("pretrain")
    await cluster.delete("jobs", name)
    async with running(jobs_of(tmp_path, api)):
        await started(cluster)


async def test_the_progress_in_the_pods_log_reaches_whoever_asks(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    jobs = jobs_of(tmp_path, api)
    assert jobs.progress("pretrain") is None

    def line(done: float) -> str:
        record = logging.makeLogRecord({"msg": "step", "levelname": "INFO", "name": "honed.kit.progress"})
        record.job_progress = {"done": done, "doing": f"step {done:g}", "figures": {"loss": 3.5}}
        return JsonFormatter("pretrain").format(record) + "\n"

    async with running(jobs) as task:
        name = await followed(cluster)
        await add_pod(cluster, await started(cluster), "one-x", phase="Running")
        cluster.logs["one-x"] = "hello\n" + line(0.25) + "another line\n" + json.dumps({"job_progress": 3}) + "\n"
        await until(lambda: jobs.progress("pretrain"), 60, "progress")
        assert jobs.progress("pretrain") == JobProgress(0.25, "step 0.25", {"loss": 3.5})
        assert jobs.states()[0].ready
        cluster.logs["one-x"] += line(0.75) + "words\n"
        await until(lambda: (jobs.progress("pretrain") or JobProgress(0, "")).done == 0.75, 60, "more progress")
        publish_base(tmp_path)
        await end_job(cluster, name, "Complete")
        await within(task)
    assert jobs.states() == []


async def test_a_pod_that_was_replaced_tells_how_it_ended(tmp_path: Path, cluster: Cluster, api: Api, template: Object) -> None:
    jobs = jobs_of(tmp_path, api)
    async with running(jobs):
        name = await followed(cluster)
        job = await started(cluster)
        await add_pod(cluster, job, "one-x")
        await end_pod(cluster, "one-x", 75, "starting\nhoned: the store does not answer\n")
        await add_pod(cluster, job, "one-y", phase="Running")
        await cluster.change("jobs", name, failed=1)
        await until(lambda: jobs.states()[0].restarts == 1 and jobs.states()[0].ready, 60, "the second pod")
        assert jobs.states()[0].last_exit == "exit code 75: honed: the store does not answer"


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (None, "it has no pod: `kubectl describe job"),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes: insufficient nvidia.com/gpu"}]},
            "pod one-x: no node takes it: 0/3 nodes: insufficient nvidia.com/gpu",
        ),
        (
            {
                "containerStatuses": [
                    {
                        "name": "job",
                        "state": {
                            "waiting": {
                                "reason": "CreateContainerConfigError",
                                "message": 'secret "honed-token-learner" not found',
                            }
                        },
                    }
                ]
            },
            SECRET,
        ),
    ],
)
async def test_a_job_that_does_not_come_to_run_is_an_alarm_that_says_why(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object, status: dict[str, Any] | None, text: str
) -> None:
    jobs = jobs_of(tmp_path, api, start_timeout_s=0.05)
    async with running(jobs):
        name = await followed(cluster)
        if status is not None:
            await add_pod(cluster, await started(cluster), "one-x", **status)
        await until(lambda: text in jobs.states()[0].alarm, 60, "the alarm")
        assert jobs.states()[0].alarm.startswith(f"job {name} does not run: ")
        if status is not None:
            await cluster.change("pods", "one-x", phase="Running", conditions=[], containerStatuses=[])
            await until(lambda: not jobs.states()[0].alarm, 60, "the alarm ends")


@pytest.mark.parametrize("kind", ["old", "half-open", "half-line", "ended", "cut", "silent", "refused"])
async def test_a_watch_that_goes_wrong_costs_time_only(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object, kind: str
) -> None:
    cluster.faults = [Fault(kind, matches=on("watch", "jobs")) for _ in range(2)]
    async with running(jobs_of(tmp_path, api)) as task:
        name = await followed(cluster)
        await cluster.change("jobs", name, active=1)
        publish_base(tmp_path)
        await end_job(cluster, name, "Complete")
        await within(task)
    assert cluster.asked("create", "jobs") == 1


async def test_a_watch_that_ends_at_once_again_and_again_is_no_storm_of_requests(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    cluster.faults = [Fault("ended", matches=on("watch", "jobs")) for _ in range(10_000)]
    async with running(jobs_of(tmp_path, api)):
        await followed(cluster)
        before = cluster.asked("watch", "jobs")
        await asyncio.sleep(0.4)  # the longest pause is 0.02 s here, and 0.5 of it the least
        assert cluster.asked("watch", "jobs") - before <= 0.4 / 0.01 + 5


async def test_a_server_that_is_away_for_long_is_an_alarm_and_ends_nothing(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    jobs = jobs_of(tmp_path, api, start_timeout_s=0.1)
    async with running(jobs) as task:
        name = await followed(cluster)
        await add_pod(cluster, await started(cluster), "one-x", phase="Running")
        cluster.faults = [Fault("refused", 503, matches=on("list", "jobs")) for _ in range(10_000)]
        await cluster.put("jobs", {**(await started(cluster)), "status": {"active": 1}})
        await until(lambda: "cannot serve this now" in jobs.states()[0].alarm, 60, "the alarm")
        assert not task.done()
        cluster.faults = []
        await until(lambda: not jobs.states()[0].alarm, 60, "the alarm ends")
        publish_base(tmp_path)
        await end_job(cluster, name, "Complete")
        await within(task)


async def test_a_job_controller_and_its_pods_are_followed_to_the_end(
    tmp_path: Path, cluster: Cluster, api: Api, template: Object
) -> None:
    controller = JobController(cluster, exits=[75, 0], publish=lambda: publish_base(tmp_path))
    async with controller.working(), running(jobs_of(tmp_path, api)) as task:
        await within(task)
    assert len(controller.ran) == 2
    assert controller.overlaps == []
