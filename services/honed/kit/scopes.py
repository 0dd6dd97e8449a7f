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

LOCAL_TOKENS: dict[str, tuple[str, ...]] = {
    "operator": (ALL,),
    "application": APPLICATION_SCOPES,
    # Who calls whom: the learner brings versions into generators and checks what they serve; its job exports a snapshot that
    # it creates, which is a write.
    "learner": ("generation", "generation.control", "preference.read", "preference.write"),
    # The conductor evaluates (samples and scores), imports judgements, watches the learner and lets it go back; the table that
    # `honed up` shows is drawn in its process and reads its own service.
    "conductor": (
        "generation",
        "reward",
        "preference.read",
        "preference.write",
        "learner.read",
        "learner.control",
        "conductor.read",
    ),
    # The generation service scores the candidates of a request with best_of.
    "generation": ("reward",),
    # These call nobody yet with their own token (remote scorers bring that of whom they ask). Their names are in the table, so
    # that a scope is all that a first call needs.
    "reward": (),
    "preference": (),
}
"""What a local run makes for itself: a token for people who operate it, one for applications, and one for each service, which
may call what that service calls and nothing else."""


def is_control(scope: str) -> bool:
    """Tells whether calls of a scope change how the system runs, or forget somebody: these are audited."""
    return scope.endswith(".control")


def allows(granted: frozenset[str], needed: str) -> bool:
    """Tells whether a token with the scopes `granted` may make a call that needs `needed`."""
    return needed == "" or ALL in granted or needed in granted
