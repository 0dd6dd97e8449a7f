"""What the status of a Kubernetes Pod says, as plain JSON: its conditions, its containers, and in words why it does not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

Tree = Mapping[str, Any]

ENDED: Final = ("Succeeded", "Failed")
"""Phases that no Pod leaves."""

_LONGEST: Final = 400
# Reasons of a container that waits where nothing is wrong.
_STARTING: Final = frozenset({"ContainerCreating", "PodInitializing"})


def phase(pod: Tree) -> str:
    """`Pending`, `Running`, `Succeeded` or `Failed`; empty before the server has said."""
    return str(status(pod).get("phase") or "")


def status(thing: Tree) -> dict[str, Any]:
    """The status of any object; empty before it has one."""
    return dict(thing.get("status") or {})


def holds(thing: Tree, condition: str, value: str = "True") -> dict[str, Any] | None:
    """The condition of that type, if it has that value."""
    for found in status(thing).get("conditions") or ():
        if found.get("type") == condition and found.get("status") == value:
            return dict(found)
    return None


def containers(pod: Tree) -> Iterator[dict[str, Any]]:
    """The status of each container, in the order in which they start."""
    for kind in ("initContainerStatuses", "containerStatuses"):
        yield from status(pod).get(kind) or ()


def trouble(pod: Tree) -> str:
    """Why a Pod does not run or serve, in its own words where it has left any; empty if it says nothing of it."""
    return shortened("; ".join(dict.fromkeys(_troubles(pod))))


def exit_text(terminated: Tree) -> str:
    """How a container ended: its exit code, and the reason where that says more."""
    reason, code = terminated.get("reason") or "Error", f"exit code {terminated.get('exitCode')}"
    return code if reason == "Error" else f"{reason}, {code}"


def shortened(text: str) -> str:
    """What fits into a table or an error."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _troubles(pod: Tree) -> Iterator[str]:
    said = status(pod)
    if said.get("message"):
        yield f"{said.get('reason') or said.get('phase')}: {said['message']}"
    if unplaced := holds(pod, "PodScheduled", "False"):
        yield f"no node takes it: {unplaced.get('message') or unplaced.get('reason')}"
    for container in containers(pod):
        if trouble := _of_container(container):
            yield trouble


def _of_container(container: Tree) -> str:
    """Why a container does not run, or ran and died."""
    name, state = container["name"], container.get("state") or {}
    last = (container.get("lastState") or {}).get("terminated")
    if waiting := state.get("waiting"):
        reason, message = waiting.get("reason") or "waits", waiting.get("message") or ""
        if last:
            return f"{name} died {_times(container)}({_last_words(last)}), {reason}"
        if reason in _STARTING:
            return ""
        return f"{name}: {reason}" + (f": {message}" if message else "")
    if ended := state.get("terminated"):
        return f"{name} ended ({_last_words(ended)})" if ended.get("exitCode") else ""
    if "running" in state and not container.get("ready"):
        died = f", after it died {_times(container)}({_last_words(last)})" if last else ""
        return f"{name} runs and is not ready yet{died}"
    return ""


def _times(container: Tree) -> str:
    restarts = int(container.get("restartCount") or 0)
    return f"{restarts} times " if restarts > 1 else ""


def _last_words(terminated: Tree) -> str:
    """How a process ended, and its last words; with FallbackToLogsOnError its last lines."""
    lines = str(terminated.get("message") or "").strip().splitlines()
    return exit_text(terminated) + (f": {lines[-1].strip()}" if lines else "")
