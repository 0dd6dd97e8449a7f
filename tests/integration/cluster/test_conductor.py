"""Claims about conductor processes on a cluster: one drives the run and starts its jobs, another stands by and takes over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.cluster import Cluster
from tests.support.cluster_run import section
from tests.support.job_controller import add_pod, cron_job, end_job
from tests.support.run import environment, run_tree, until, write_run_file

from honed.conductor.cluster.lease import NAME
from honed.kit.log import JsonFormatter
from honed.queue.embedded import EmbeddedRedis, free_port
from honed.v1 import conductor_pb2, conductor_pb2_grpc, preference_pb2, preference_pb2_grpc

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]

SERVICE = "honed.v1.ConductorService"
SERVING = health_pb2.HealthCheckResponse.SERVING


class Preference(preference_pb2_grpc.PreferenceServiceServicer):
    """The one service that the run waits for before its first job."""

    async def GetStats(self, request: Any, context: Any) -> preference_pb2.GetStatsResponse:
        return preference_pb2.GetStatsResponse()


@dataclass
class Conductor:
    """`honed serve conductor` as a pod runs it."""

    name: str
    root: Path
    run_file: Path
    process: asyncio.subprocess.Process | None = None
    port: int = 0
    health_port: int = 0

    @property
    def log(self) -> str:
        path = self.root / f"{self.name}.log"
        return path.read_text() if path.exists() else ""

    async def start(self) -> None:
        self.port, self.health_port = free_port(), free_port()
        variables = {
            "HONED_DIRECTORY": str(self.root / "run"),  # one volume, which a pod and its successor share
            "HONED_CONDUCTOR__PORT": str(self.port),
            "HONED_CONDUCTOR__HEALTH_PORT": str(self.health_port),
            "HONED_CONDUCTOR__KUBERNETES__IDENTITY": f"{self.name}_uid",
        }
        with (self.root / f"{self.name}.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "honed.cli.main", "serve", "conductor", "--run-file", str(self.run_file)),
                env=environment(*map(Path, sys.path[1:]), **variables),
                cwd=self.root,
                stdout=log,
                stderr=log,
            )

    async def run(self) -> conductor_pb2.Run | None:
        """What GetRun answers; None while nobody does."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
                stub = conductor_pb2_grpc.ConductorServiceStub(channel)
                return (await stub.GetRun(conductor_pb2.GetRunRequest(), timeout=5)).run
        return None

    async def health(self, service: str) -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{self.health_port}") as channel:
                request = health_pb2.HealthCheckRequest(service=service)
                return bool((await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)).status == SERVING)
        return False

    async def says(self, claim: Any, what: str) -> conductor_pb2.Run:
        async def look() -> conductor_pb2.Run | None:
            found = await self.run()
            return found if found is not None and claim(found) else None

        found: conductor_pb2.Run = await until(look, 40, what, every_s=0.1)
        return found

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def ended(self) -> int:
        assert self.process is not None
        return await asyncio.wait_for(self.process.wait(), 30)


@asynccontextmanager
async def conductors(root: Path, cluster: Cluster) -> AsyncIterator[tuple[Conductor, Conductor]]:
    server = grpc.aio.server()
    preference_pb2_grpc.add_PreferenceServiceServicer_to_server(Preference(), server)
    preference = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with EmbeddedRedis(root / "redis") as url:
        kubeconfig = section(root, cluster).kubeconfig
        tree = run_tree(
            root,
            policy={"url": f"file://{root / 'policy'}"},
            queue={"url": url},
            preference={"port": preference},
            security={"authentication": False},
            conductor={
                "launcher": "kubernetes",
                "start_timeout_s": 1.0,
                "kubernetes": {"kubeconfig": str(kubeconfig), "lease_s": 2.0, "request_timeout_s": 2.0},
            },
        )
        for name in ("generation", "reward", "learner"):
            tree[name] = {**tree[name], "port": free_port()}
        file = write_run_file(root / "run.yaml", tree)
        pair = Conductor("one", root, file), Conductor("two", root, file)
        try:
            yield pair
        finally:
            for conductor in pair:
                if conductor.process is not None:
                    with contextlib.suppress(ProcessLookupError):
                        conductor.process.kill()
                    await conductor.process.wait()
            await server.stop(None)


def holder(cluster: Cluster) -> str:
    lease = cluster.object("leases", NAME)
    return str(lease["spec"].get("holderIdentity", "")) if lease else ""


async def test_one_conductor_drives_another_stands_by_and_takes_the_job_over(tmp_path: Path, cluster: Cluster) -> None:
    cluster.second_s = 1.0
    await cluster.put("cronjobs", cron_job())
    async with conductors(tmp_path, cluster) as (one, two):
        await one.start()
        await until(lambda: one.health(SERVICE), 60, "it serves", every_s=0.1)
        assert holder(cluster) == "one_uid"
        await until(lambda: cluster.all("jobs"), 60, "the job")
        [job] = cluster.all("jobs")

        # The pod runs and tells how far it is.
        await add_pod(cluster, job, "one-x", phase="Running")
        record = logging.makeLogRecord({"msg": "step", "levelname": "INFO", "name": "honed.kit.progress"})
        record.job_progress = {"done": 0.25, "doing": "step 7", "figures": {"loss": 3.5}}
        cluster.logs["one-x"] = "2,000 texts are empty\n" + JsonFormatter("pretrain").format(record) + "\n"
        told = await one.says(lambda run: run.phase_progress == 0.25, "the progress of the job")
        assert (told.phase_name, told.doing) == ("pretrain", "training the language model: step 7")
        assert dict(told.figures) == {"loss": 3.5}
        [job_told] = [process for process in told.processes if process.name == "pretrain"]
        assert (job_told.healthy, list(job_told.log_tail)) == (True, ["2,000 texts are empty"])

        # A second one is alive, not ready, and says for whom it waits.
        await two.start()
        waiting = await two.says(lambda run: run.doing.startswith("standing by"), "it stands by")
        assert waiting.doing == f"standing by: the Lease {NAME} is held by one_uid with number 1"
        assert (await two.health(""), await two.health(SERVICE)) == (True, False)
        assert '"message": "standing by"' in two.log

        # The first one is killed: the second one follows the same job.
        one.signal(signal.SIGKILL)
        await one.ended()
        await until(lambda: two.health(SERVICE), 60, "it takes over", every_s=0.1)
        lease = cluster.object("leases", NAME)
        assert lease is not None
        assert (lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"]) == ("two_uid", 2)
        await two.says(lambda run: run.phase_progress == 0.25, "the progress of the same job")
        assert cluster.asked("create", "jobs") == 1

        # The job fails for good: the run has failed, says why, and goes on answering.
        cluster.logs["one-x"] += "honed: data.texts: there are no texts\n"
        containers = [{"name": "job", "state": {"terminated": {"exitCode": 1, "reason": "Error"}}}]
        await cluster.change("pods", "one-x", phase="Failed", containerStatuses=containers)
        await end_job(cluster, job["metadata"]["name"], "Failed", "PodFailurePolicy", "it hurts", failed=1)
        lost = await two.says(lambda run: run.phase_name == "failed", "the run has failed")
        assert f"job {job['metadata']['name']} failed (exit code 1; PodFailurePolicy: it hurts)" in lost.error
        assert "honed: data.texts: there are no texts" in lost.error
        assert {p.name: p.last_exit for p in lost.processes}["pretrain"] == "exit code 1"

        # A third one waits, and ends at once when it is told to; the holder lets go of the Lease when it ends.
        await one.start()
        await one.says(lambda run: run.doing.startswith("standing by"), "it stands by")
        one.signal(signal.SIGTERM)
        assert await one.ended() == 0
        assert holder(cluster) == "two_uid"
        two.signal(signal.SIGTERM)
        assert await two.ended() == 0
        assert holder(cluster) == ""
        assert cluster.asked("create", "jobs") == 1


async def test_who_loses_the_lease_ends_and_its_last_line_says_why(tmp_path: Path, cluster: Cluster) -> None:
    cluster.second_s = 1.0
    await cluster.put("cronjobs", cron_job())
    async with conductors(tmp_path, cluster) as (one, _):
        await one.start()
        await until(lambda: cluster.all("jobs"), 60, "it drives the run")
        lease = cluster.object("leases", NAME)
        assert lease is not None
        spec = {**lease["spec"], "holderIdentity": "another", "leaseTransitions": 5}
        await cluster.put("leases", {**lease, "spec": spec})
        assert await one.ended() == 1
        last = one.log.strip().splitlines()[-1]
        assert last.startswith(f"honed: the Lease {NAME} went to another with number 5, and this conductor had number 1")
        assert holder(cluster) == "another"
        assert len(cluster.all("jobs")) == 1
        assert not (tmp_path / "run" / "endpoints.json").exists()


async def test_without_a_cluster_it_says_so_in_its_last_line(tmp_path: Path, cluster: Cluster) -> None:
    async with conductors(tmp_path, cluster) as (one, _):
        (tmp_path / "kubeconfig").write_text("{}")
        await one.start()
        assert await one.ended() == 1
        assert "honed: there is no way to the cluster's API" in one.log.strip().splitlines()[-1]
