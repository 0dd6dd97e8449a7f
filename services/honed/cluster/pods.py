"""The Pods of a run: which are ready, at which ports, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from honed.cluster.api import Cluster, items
from honed.kit import pod_status
from honed.kit.errors import HonedError, Unavailable

NAME_LABEL: Final = "app.kubernetes.io/name"
COMPONENT_LABEL: Final = "app.kubernetes.io/component"
_PORTS: Final = {"grpc": 50051, "control": 50052, "health": 8081, "metrics": 9090, "redis": 6379}
STARTING: Final = "it is starting"


@dataclass(frozen=True)
class Pod:
    """One Pod, as the API server describes it."""

    tree: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.tree["metadata"]["name"])

    @property
    def component(self) -> str:
        """What it is of the run: `generation`, `redis` and so on."""
        return str(self.tree["metadata"].get("labels", {}).get(COMPONENT_LABEL, ""))

    @property
    def address(self) -> str:
        """Its IP address; empty before it has one."""
        return str(pod_status.status(self.tree).get("podIP") or "")

    @property
    def leaving(self) -> bool:
        """Whether it has been told to end."""
        return "deletionTimestamp" in self.tree["metadata"]

    @property
    def ended(self) -> bool:
        """Whether it will not run again, as the Pods of Jobs."""
        return pod_status.phase(self.tree) in pod_status.ENDED

    @property
    def ready(self) -> bool:
        """Whether its service answers."""
        return not self.leaving and pod_status.holds(self.tree, "Ready") is not None

    @property
    def restarts(self) -> int:
        """How often its containers were started again."""
        own = pod_status.status(self.tree).get("containerStatuses") or ()
        return sum(int(container.get("restartCount") or 0) for container in own)

    def port(self, name: str) -> int:
        """The port of that name, or the one that honed's Pods have."""
        for container in self.tree["spec"].get("containers") or ():
            for port in container.get("ports") or ():
                if port.get("name") == name:
                    return int(port["containerPort"])
        return _PORTS[name]

    @property
    def trouble(self) -> str:
        """Why it is not ready, in its own words where it has left any; empty if it is ready."""
        if self.ready:
            return ""
        return "it is ending" if self.leaving else pod_status.trouble(self.tree) or STARTING


def list_pods(cluster: Cluster, component: str | None = None) -> list[Pod]:
    """The Pods of the run, or of one component; those that have ended are left out.

    Raises:
        HonedError: the API server refuses or does not answer.
    """
    wanted = f"{NAME_LABEL}=honed" + (f",{COMPONENT_LABEL}={component}" if component else "")
    found = [Pod(tree) for tree in items(cluster.get(cluster.core("pods"), labelSelector=wanted))]
    return sorted((pod for pod in found if not pod.ended), key=lambda pod: pod.name)


def trouble_of(cluster: Cluster, pod: Pod) -> str:
    """Why a Pod is not ready. What keeps its containers from being made, such as a missing Secret, only its events tell."""
    if pod.trouble != STARTING:
        return pod.trouble
    try:
        events = cluster.get(cluster.core("events"), fieldSelector=f"involvedObject.name={pod.name},type=Warning")
    except HonedError:
        return STARTING
    newest = max(items(events), key=_when, default=None)
    return STARTING if newest is None else pod_status.shortened(f"{STARTING}; {newest.get('message') or newest.get('reason')}")


def none_ready(cluster: Cluster, component: str, pods: Sequence[Pod]) -> Unavailable:
    """Why nobody answers for a component."""
    where = f"in namespace {cluster.name}"
    if pods:
        reasons = "; ".join(f"{pod.name}: {trouble_of(cluster, pod)}" for pod in pods)
        return Unavailable(f"no {component} Pod is ready {where} ({reasons}); `{cluster.kubectl} describe pods` tells more")
    if reason := _no_pods(cluster, component):
        return Unavailable(f"there is no {component} Pod {where}: {reason}")
    return Unavailable(
        f"there is no {component} Pod {where} (none has the labels {NAME_LABEL}=honed, {COMPONENT_LABEL}={component}): deploy "
        "honed there, or name where it is: --cluster CONTEXT/NAMESPACE"
    )


def _no_pods(cluster: Cluster, component: str) -> str:
    """What the workload says of its missing Pods, if the caller may read it."""
    for kind in ("deployments", "statefulsets"):
        try:
            found = cluster.find(cluster.group("apps/v1", kind, f"honed-{component}"))
        except HonedError:
            return ""  # the Pods were readable: whoever may read them alone learns less
        if found is None:
            continue
        if found["spec"].get("replicas", 1) == 0:
            advice = f"`honed --cluster scale {component}=1`" if component in ("generation", "reward") else cluster.kubectl
            return f"honed-{component} is scaled to 0, by a person or an autoscaler: {advice} starts one"
        if failing := pod_status.holds(found, "ReplicaFailure"):
            return pod_status.shortened(str(failing.get("message") or failing.get("reason")))
        return f"honed-{component} has none yet; `{cluster.kubectl} get events` tells why"
    return ""


def _when(event: dict[str, Any]) -> str:
    """A time that sorts as text."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")
