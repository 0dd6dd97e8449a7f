"""ConductorService: the run, its processes, and the versions that it has made."""

from __future__ import annotations

import asyncio
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from honed.artifacts.manifest import Manifest
from honed.artifacts.store import PolicyStore
from honed.conductor.run import Run
from honed.kit.errors import InvalidArgument, NotFound, Unimplemented
from honed.v1 import common_pb2, conductor_pb2, conductor_pb2_grpc

DEFAULT_PAGE = 100


class ConductorService(conductor_pb2_grpc.ConductorServiceServicer):
    """Answers for the one run of this conductor."""

    def __init__(self, run: Run, store: PolicyStore) -> None:
        """Serves `run`; versions come from `store`."""
        self._run, self._store = run, store

    async def StartRun(self, request: conductor_pb2.StartRunRequest, context: Any) -> conductor_pb2.StartRunResponse:
        """The conductor starts its run by itself; the call returns it, so that it may be repeated."""
        self._check(request.run)
        return conductor_pb2.StartRunResponse(run=self._message())

    async def GetRun(self, request: conductor_pb2.GetRunRequest, context: Any) -> conductor_pb2.GetRunResponse:
        """Tells where the run stands."""
        self._check(request.run)
        return conductor_pb2.GetRunResponse(run=self._message())

    async def ListRuns(self, request: conductor_pb2.ListRunsRequest, context: Any) -> conductor_pb2.ListRunsResponse:
        """Lists the run."""
        return conductor_pb2.ListRunsResponse(runs=[self._message()])

    async def StopRun(self, request: conductor_pb2.StopRunRequest, context: Any) -> conductor_pb2.StopRunResponse:
        """Ends admission and the run with it."""
        self._check(request.run)
        self._run.stopping.set()
        return conductor_pb2.StopRunResponse(run=self._message())

    async def ListVersions(
        self, request: conductor_pb2.ListVersionsRequest, context: Any
    ) -> conductor_pb2.ListVersionsResponse:
        """Lists the versions that the store holds, newest first."""
        self._check(request.run)
        versions = list(reversed(await asyncio.to_thread(self._store.versions)))
        start = _offset(request.page.page_token)
        size = request.page.page_size or DEFAULT_PAGE
        page = versions[start : start + size]
        manifests = [await asyncio.to_thread(self._store.manifest, version) for version in page]
        more = str(start + size) if start + size < len(versions) else ""
        return conductor_pb2.ListVersionsResponse(versions=[_info(m) for m in manifests], next_page_token=more)

    async def CompareVersions(
        self, request: conductor_pb2.CompareVersionsRequest, context: Any
    ) -> conductor_pb2.CompareVersionsResponse:
        """Comes with promotion."""
        raise Unimplemented("CompareVersions is not served yet")

    async def PromoteVersion(
        self, request: conductor_pb2.PromoteVersionRequest, context: Any
    ) -> conductor_pb2.PromoteVersionResponse:
        """Comes with promotion."""
        raise Unimplemented("PromoteVersion is not served yet")

    async def RollbackVersion(
        self, request: conductor_pb2.RollbackVersionRequest, context: Any
    ) -> conductor_pb2.RollbackVersionResponse:
        """Comes with promotion."""
        raise Unimplemented("RollbackVersion is not served yet")

    async def SubmitPrompts(
        self, request: conductor_pb2.SubmitPromptsRequest, context: Any
    ) -> conductor_pb2.SubmitPromptsResponse:
        """Adds prompts to those that the run trains on."""
        self._check(request.run)
        return await self._run.submit_prompts(request)

    async def SetReplicas(self, request: conductor_pb2.SetReplicasRequest, context: Any) -> conductor_pb2.SetReplicasResponse:
        """Starts or ends processes."""
        raise Unimplemented("SetReplicas is not served yet")

    def _check(self, run: str) -> None:
        if run not in ("", self._run.settings.run):
            raise NotFound(f"this conductor drives the run {self._run.settings.run!r}, not {run!r}")

    def _message(self) -> conductor_pb2.Run:
        state, learner = self._run.state, self._run.state.learner
        progress = self._run.job_progress()
        share = progress.done if progress else 0.0
        if learner is not None and learner.target_steps:
            share = learner.version.step / learner.target_steps
        message = conductor_pb2.Run(
            run=self._run.settings.run,
            phase=state.phase,
            started_at=_timestamp(state.started_at),
            ended_at=_timestamp(state.ended_at) if state.ended_at else None,
            error=state.error,
            phase_progress=share,
            processes=[
                conductor_pb2.ProcessStatus(name=p.name, healthy=p.ready, restarts=p.restarts, last_exit=p.last_exit)
                for p in self._run.launcher.states()
            ],
        )
        if state.depths is not None:
            depths = state.depths
            message.queue_depth.update({"prompts": depths.prompts, "rollouts": depths.rollouts, "scored": depths.scored})
            message.prompts_admitted = state.admitted
        message.figures.update(state.figures)
        message.accounts.update(state.accounts)
        return message


def _info(manifest: Manifest) -> conductor_pb2.VersionInfo:
    version, lineage = manifest.version, manifest.lineage
    message = common_pb2.Lineage(
        parent=lineage.parent,
        config_hash=lineage.config_hash,
        reward_model_version=lineage.reward_model_version,
        preference_snapshot=lineage.preference_snapshot,
        first_entry=lineage.first_entry,
        last_entry=lineage.last_entry,
    )
    if lineage.created_at:
        message.created_at.FromJsonString(lineage.created_at.replace("+00:00", "Z"))
    return conductor_pb2.VersionInfo(
        version=common_pb2.PolicyVersion(run=manifest.run, fence=version.fence, step=version.step),
        lineage=message,
        bytes=manifest.total_bytes,
        manifest_sha256=manifest.digest,
    )


def _offset(token: str) -> int:
    if token and not token.isdecimal():
        raise InvalidArgument("page.page_token", f"{token!r} did not come from this call")
    return int(token or 0)


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp
