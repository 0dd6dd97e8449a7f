"""Which scope each call of the contract needs.

A token carries scopes; `*` carries all. A call that is not in the table is refused, so that a new RPC is never open by
accident.
"""

from __future__ import annotations

ALL = "*"

_READ_PREFERENCE = ("NextTask", "ExportJudgements", "GetStats")
_WRITE_PREFERENCE = ("RecordJudgement", "ImportJudgements", "SubmitTask", "CreateSnapshot")

SCOPES: dict[str, str] = {
    **{f"/honed.v1.GenerationService/{m}": "generation" for m in ("Generate", "StreamGenerate", "GetPolicy")},
    **{
        f"/honed.v1.GenerationControlService/{m}": "generation.control"
        for m in ("PrepareVersion", "CommitVersion", "AbortVersion", "Pause", "Resume", "Drain")
    },
    **{f"/honed.v1.RewardService/{m}": "reward" for m in ("Score", "StreamScore", "ListScorers")},
    **{f"/honed.v1.RewardService/{m}": "reward.control" for m in ("LoadScorer", "PromoteScorer")},
    **{f"/honed.v1.PreferenceService/{m}": "preference.read" for m in _READ_PREFERENCE},
    **{f"/honed.v1.PreferenceService/{m}": "preference.write" for m in _WRITE_PREFERENCE},
    "/honed.v1.PreferenceService/EraseAnnotator": "preference.control",
    **{f"/honed.v1.LearnerService/{m}": "learner.read" for m in ("GetStatus", "WatchMetrics", "WatchPushes")},
    **{f"/honed.v1.LearnerService/{m}": "learner.control" for m in ("Pause", "Resume", "Checkpoint", "Rollback")},
    **{f"/honed.v1.ConductorService/{m}": "conductor.read" for m in ("GetRun", "ListRuns", "ListVersions", "CompareVersions")},
    **{
        f"/honed.v1.ConductorService/{m}": "conductor.control"
        for m in ("StartRun", "StopRun", "PromoteVersion", "RollbackVersion", "SubmitPrompts", "SetReplicas")
    },
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": "",
}
"""Full method name to scope; an empty scope needs no token."""

APPLICATION_SCOPES = ("generation", "reward", "preference.write")
"""What an application gets that generates, scores and sends feedback."""


def allows(granted: frozenset[str], needed: str) -> bool:
    """Tells whether a token with the scopes `granted` may make a call that needs `needed`."""
    return needed == "" or ALL in granted or needed in granted
