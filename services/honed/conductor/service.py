"""ConductorService: the run, its processes, and the versions that it has made."""

from __future__ import annotations

import asyncio
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from honed.conductor import metrics
from honed.conductor.run import Run
from honed.conductor.state import PHASE_NAMES
from honed.conductor.versions import Versions
from honed.kit.errors import InvalidArgument, NotFound
from honed.kit.idempotency import Once
from honed.kit.server import Listener, Server, Servicer
from honed.queue.members import Member
from honed.runtime import server_options
from honed.topology import REPLICATED, SERVICES
from honed.v1 import conductor_pb2, conductor_pb2_grpc

DEFAULT_PAGE = 100
REGISTERED_TIMEOUT_S = 15.0


def conductor_server(run: Run) -> Server:
    """The server of a run's conductor; nothing listens yet."""
    section = run.settings.conductor
    metrics.observe(run)
    service = ConductorService(run, Versions(run.settings, run.fleet, run.store, run.workspace))
    add = conductor_pb2_grpc.add_ConductorServiceServicer_to_server
    servicer = Servicer(SERVICES["conductor"].grpc_name, add, service)
    return Server([Listener(section.host, section.port, [servicer])], server_options(run.settings, section))


class ConductorService(conductor_pb2_grpc.ConductorServiceServicer):
    """Answers for the one run of this conductor."""

    def __init__(self, run: Run, versions: Versions) -> None:
        """Serves `run`."""
        self._run, self._versions = run, versions
        self._scaled: Once[conductor_pb2.SetReplicasResponse] = Once()

    async def StartRun(self, request: conductor_pb2.StartRunRequest, context: Any) -> conductor_pb2.StartRunResponse:
        """The conductor starts its run by itself; the call returns it, so that it may be repeated."""
        self._check(request.run)
        return conductor_pb2.StartRunResponse(run=self._message())

    async def GetRun(self, request: conductor_pb2.GetRunRequest, context: Any) -> conductor_pb2.GetRunResponse:
        """Where the run stands."""
        self._check(request.run)
        return conductor_pb2.GetRunResponse(run=self._message())

    async def ListRuns(self, request: conductor_pb2.ListRunsRequest, context: Any) -> conductor_pb2.ListRunsResponse:
        """Lists the run."""
        return conductor_pb2.ListRunsResponse(runs=[self._message()])

    async def StopRun(self, request: conductor_pb2.StopRunRequest, context: Any) -> conductor_pb2.StopRunResponse:
        """Ends admission; the learner's update in hand finishes, then every process ends that the conductor started."""
        self._check(request.run)
        self._run.stopping.set()
        return conductor_pb2.StopRunResponse(run=self._message())

    async def ListVersions(
        self, request: conductor_pb2.ListVersionsRequest, context: Any
    ) -> conductor_pb2.ListVersionsResponse:
        """Lists the versions that the store holds, newest first."""
        self._check(request.run)
        start, size = _offset(request.page.page_token), request.page.page_size or DEFAULT_PAGE
        page, total = await self._versions.page(start, size)
        more = str(start + size) if start + size < total else ""
        return conductor_pb2.ListVersionsResponse(versions=page, next_page_token=more)

    async def CompareVersions(
        self, request: conductor_pb2.CompareVersionsRequest, context: Any
    ) -> conductor_pb2.CompareVersionsResponse:
        """Continues the same prompts with both versions, and scores what they say."""
        for version in (request.left, request.right):
            self._check(version.run)
        return await self._versions.compare(request)

    async def PromoteVersion(
        self, request: conductor_pb2.PromoteVersionRequest, context: Any
    ) -> conductor_pb2.PromoteVersionResponse:
        """Marks a version, so that it is never removed."""
        self._check(request.version.run)
        info = await self._versions.promote(request.version, request.reason)
        return conductor_pb2.PromoteVersionResponse(version=info)

    async def RollbackVersion(
        self, request: conductor_pb2.RollbackVersionRequest, context: Any
    ) -> conductor_pb2.RollbackVersionResponse:
        """Lets learner and generators go back together."""
        self._check(request.version.run)
        info = await self._versions.roll_back(request.version, request.idempotency_key)
        return conductor_pb2.RollbackVersionResponse(version=info)

    async def SubmitPrompts(
        self, request: conductor_pb2.SubmitPromptsRequest, context: Any
    ) -> conductor_pb2.SubmitPromptsResponse:
        """Adds prompts to those that the run trains on."""
        self._check(request.run)
        return await self._run.loop.submit_prompts(request)

    async def SetReplicas(self, request: conductor_pb2.SetReplicasRequest, context: Any) -> conductor_pb2.SetReplicasResponse:
        """Starts or ends processes; returns when leavers have drained and newcomers are where clients look.

        That is in `endpoints.json`, and in the list of processes that GetRun returns.
        """
        self._check(request.run)

        async def scale() -> conductor_pb2.SetReplicasResponse:
            expected = await self._run.fleet.scale(request.service, request.replicas)
            await self._run.roster.shows(request.service, expected, REGISTERED_TIMEOUT_S)
            return conductor_pb2.SetReplicasResponse(run=self._message())

        # Shielded: newcomers start one after another, and a caller that gives up must not leave it at half of them.
        return await asyncio.shield(asyncio.ensure_future(self._scaled(request.idempotency_key, scale)))

    def _check(self, run: str) -> None:
        if run not in ("", self._run.settings.run):
            raise NotFound(f"this conductor drives the run {self._run.settings.run!r}, not {run!r}")

    def _message(self) -> conductor_pb2.Run:
        state, learner = self._run.state, self._run.state.learner
        progress = self._run.job_progress()
        share = progress.done if progress else 0.0
        figures = dict(progress.figures if progress else state.figures)
        target = self._run.settings.learner.steps or 0
        if learner is not None and target:
            share = learner.version.step / target
        message = conductor_pb2.Run(
            run=self._run.settings.run,
            phase=state.phase,
            phase_name=PHASE_NAMES[state.phase],
            doing=f"{state.doing}: {progress.doing}" if progress and progress.done < 1 else state.doing,
            started_at=_timestamp(state.started_at),
            ended_at=_timestamp(state.ended_at) if state.ended_at else None,
            error=state.error,
            phase_progress=min(1.0, share),
            figures=figures,
            alarms=self._run.alarms(),
            accounts=state.accounts,
            target_steps=target,
            prompts_admitted=state.admitted,
            processes=self._processes(),
        )
        if state.depths is not None:
            depths = state.depths
            message.queue_depth.update({"prompts": depths.prompts, "rollouts": depths.rollouts, "scored": depths.scored})
        return message

    def _processes(self) -> list[conductor_pb2.ProcessStatus]:
        """The processes that the conductor started, and those that have registered."""
        rows: list[conductor_pb2.ProcessStatus] = []
        members = {member.address: member for role in REPLICATED for member in self._run.roster.members.get(role, ())}
        for process in self._run.fleet.states():
            member = members.pop(self._run.fleet.address(process.name), None)
            rows.append(
                conductor_pb2.ProcessStatus(
                    name=process.name,
                    healthy=process.ready and (member is None or member.ready),
                    restarts=process.restarts,
                    last_exit=process.last_exit,
                    pid=process.pid or 0,
                    address=member.address if member else "",
                    version=member.version if member else "",
                    metrics_port=_metrics_port(member) if member else 0,
                    log_tail=process.log_tail,
                )
            )
        others = (
            conductor_pb2.ProcessStatus(
                name=m.name, healthy=m.ready, address=m.address, version=m.version, metrics_port=_metrics_port(m)
            )
            for m in members.values()
        )
        return [*rows, *others]


def _metrics_port(member: Member) -> int:
    return int(member.facts.get("metrics_port", 0))  # a replica of an older build does not say


def _offset(token: str) -> int:
    if token and not token.isdecimal():
        raise InvalidArgument("page.page_token", f"{token!r} did not come from this call")
    return int(token or 0)


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp
