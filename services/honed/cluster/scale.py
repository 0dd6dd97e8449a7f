"""More or fewer Pods of a service: sets the replicas of its Deployment, and waits until they are there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from honed.cluster.api import MERGE_PATCH, Cluster, items
from honed.cluster.pods import Pod, list_pods, trouble_of
from honed.kit.errors import DeadlineExceeded, FailedPrecondition, HonedError, NotFound, Unavailable

_POLL_S: Final = 1.0
_LOOK_S: Final = 10.0
_REASON_S: Final = 2.0


def scale(cluster: Cluster, wanted: Mapping[str, int], timeout_s: float) -> list[Pod]:
    """Sets the replicas of each service, and returns its Pods once so many are ready and those that go are gone.

    Raises:
        FailedPrecondition: an autoscaler decides.
        NotFound: there is no Deployment of that name.
        DeadlineExceeded: it took longer; the number stays set.
        Unavailable: the API server does not answer; the number may be set.
        HonedError: the API server refuses.
    """
    end = time.monotonic() + timeout_s
    for service in wanted:
        _check_free(cluster, _deployment(service))
    for service, replicas in wanted.items():
        _set(cluster, service, replicas)
    return [pod for service, replicas in wanted.items() for pod in _settled(cluster, service, replicas, end)]


def _set(cluster: Cluster, service: str, replicas: int) -> None:
    path = cluster.group("apps/v1", "deployments", _deployment(service), "scale")
    try:
        cluster.call("PATCH", path, {"spec": {"replicas": replicas}}, MERGE_PATCH)
    except NotFound as error:
        raise NotFound(
            f"namespace {cluster.name} has no Deployment {_deployment(service)}: is honed deployed there?"
        ) from error


def _settled(cluster: Cluster, service: str, replicas: int, end: float) -> list[Pod]:
    while True:
        left_s = end - time.monotonic()
        try:
            with cluster.briefly(max(_POLL_S, min(_LOOK_S, left_s))) as brief:
                pods = list_pods(brief, service)
            if len(pods) == replicas and all(pod.ready for pod in pods):
                return pods
        except Unavailable:
            if left_s <= 0:
                raise
        else:
            if left_s <= 0:
                raise _late(cluster, service, replicas, pods)
        time.sleep(min(_POLL_S, max(0.0, left_s)))


def _late(cluster: Cluster, service: str, replicas: int, pods: Sequence[Pod]) -> DeadlineExceeded:
    with cluster.briefly(_REASON_S) as brief:
        reasons = "; ".join(f"{pod.name}: {trouble_of(brief, pod)}" for pod in pods if not pod.ready)
    ready = sum(pod.ready for pod in pods)
    return DeadlineExceeded(
        f"{ready} of {len(pods)} {service} Pods are ready, and {replicas} are wanted ({reasons or 'they come or go'}); "
        f"the number stays set, and `{cluster.kubectl} get pods` shows how they are"
    )


def _check_free(cluster: Cluster, deployment: str) -> None:
    """Raises FailedPrecondition where an autoscaler would set another number at once."""
    try:
        found = cluster.get(cluster.group("autoscaling/v2", "horizontalpodautoscalers"))
    except HonedError:
        return  # who may not read them learns from the result
    for scaler in items(found):
        target: dict[str, Any] = scaler["spec"]["scaleTargetRef"]
        if (target["kind"], target["name"]) == ("Deployment", deployment):
            name = scaler["metadata"]["name"]
            raise FailedPrecondition(
                f"the autoscaler {name} sets the replicas of {deployment}, from {scaler['spec'].get('minReplicas', 1)} to "
                f"{scaler['spec']['maxReplicas']}: change its limits (of KEDA's ScaledObject, if that made it) in the overlay"
            )


def _deployment(service: str) -> str:
    return f"honed-{service}"
