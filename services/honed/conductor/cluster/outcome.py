"""What the status of a Job and of its pods says: is it done, why did it fail, what does it wait for.

Exit status 75 of `honed job` means that the failure may pass; a container that a signal has ended (the kernel's for its memory,
a driver's fault), a pod that was evicted or whose node went away may succeed elsewhere. Any other exit status is the job's own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from honed.conductor.cluster.api import Object
from honed.conductor.logs import last_lines
from honed.kit import pod_status
from honed.kit.errors import DeadlineExceeded, FailedPrecondition, HonedError, Unavailable

KILLED: Final = range(129, 160)
"""Exit status of a container that a signal has ended: 128 and its number."""


@dataclass(frozen=True)
class Verdict:
    """Where a Job stands. `reason` and `message` are the failed condition's."""

    kind: Literal["active", "complete", "failed"]
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class Exit:
    """How a pod ended.

    Attributes:
        pod: Its name.
        container: Whose exit it is; empty if none ended by itself.
        code: Its exit status; None without one.
        text: The same for people.
        message: The container's last words.
        passing: Whether another try may succeed.
    """

    pod: str
    container: str
    code: int | None
    text: str
    message: str
    passing: bool


def verdict(job: Object) -> Verdict:
    """Where a Job stands. A Job with a failure that has yet to end its pods is active."""
    if done := pod_status.holds(job, "Complete"):
        return Verdict("complete", done.get("reason") or "", done.get("message") or "")
    if failed := pod_status.holds(job, "Failed"):
        return Verdict("failed", failed.get("reason") or "", failed.get("message") or "")
    return Verdict("active")


def newest(pods: Sequence[Object]) -> Object | None:
    """The pod that was created last."""
    return max(pods, key=lambda pod: (pod["metadata"].get("creationTimestamp") or "", pod["metadata"]["name"]), default=None)


def runs(pod: Object) -> bool:
    """Whether a container of the pod's own runs."""
    return pod_status.phase(pod) == "Running"


def ended(pod: Object) -> bool:
    """Whether nothing of the pod runs any more, or ever will."""
    return pod_status.phase(pod) in pod_status.ENDED


def last_exit(pods: Sequence[Object]) -> Exit | None:
    """How the pod ended that failed last; None while none has."""
    failed = [pod for pod in pods if pod_status.phase(pod) == "Failed"]
    return _exit(max(failed, key=lambda pod: (_finished_at(pod), pod["metadata"]["name"]))) if failed else None


def waits_for(pod: Object) -> str:
    """Why a pod does not run yet; empty if it does not say."""
    if not (trouble := pod_status.trouble(pod)):
        return ""
    return f"pod {pod['metadata']['name']}: {trouble}"


def failure(name: str, found: Verdict, last: Exit | None, log: str) -> HonedError:
    """The error of a failed Job.

    Args:
        name: The Job's.
        found: What it says.
        last: How its last pod ended, if that is known.
        log: The end of that pod's log, if that is known.
    """
    how = f"{last.text}; " if last else ""
    text = f"job {name} failed ({how}{found.reason}: {found.message})"
    if last is not None and (lines := last_lines(log or last.message)):
        text += f"; the end of the log of pod {last.pod}:\n" + "\n".join(lines)
    if found.reason == "DeadlineExceeded":
        return DeadlineExceeded(text)
    if found.reason == "PodFailurePolicy" or (last is not None and not last.passing):
        return FailedPrecondition(f"{text}\nCorrect it, delete the job and restart the conductor: kubectl delete job {name}")
    return Unavailable(text)


def main_container(pod: Object) -> str:
    """The container whose log is the job's."""
    return str(pod["spec"]["containers"][0]["name"])


def _exit(pod: Object) -> Exit:
    name, status = str(pod["metadata"]["name"]), pod_status.status(pod)
    disrupted = pod_status.holds(pod, "DisruptionTarget") is not None
    for container in pod_status.containers(pod):
        state = (container.get("state") or {}).get("terminated")
        if state and state.get("exitCode"):
            code, message = int(state["exitCode"]), state.get("message") or ""
            passing = disrupted or code == os.EX_TEMPFAIL or code in KILLED
            return Exit(name, str(container["name"]), code, pod_status.exit_text(state), message, passing)
    reason, message = status.get("reason") or "its pod failed", status.get("message") or ""
    return Exit(name, "", None, f"{reason}: {message}" if message else reason, message, passing=True)


def _finished_at(pod: Object) -> str:
    """RFC 3339 in UTC, which sorts as text."""
    finished = [((c.get("state") or {}).get("terminated") or {}).get("finishedAt") or "" for c in pod_status.containers(pod)]
    return max([*finished, pod["metadata"].get("creationTimestamp") or ""])
