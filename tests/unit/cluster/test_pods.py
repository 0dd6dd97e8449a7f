"""Claims about Pods: which are ready, and why the others are not, in words that say what to do."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.kubernetes import KubernetesApi, pod

from honed.cluster.api import Cluster
from honed.cluster.pods import STARTING, Pod, list_pods, none_ready, trouble_of


def container(state: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "generation", "ready": False, "restartCount": 0, "state": state, **more}


def made(*, ready: bool = False, **status: Any) -> Pod:
    tree = pod("generation", ready=ready, **status)
    tree["metadata"]["name"] = "g-1"
    return Pod(tree)


DIED = {"exitCode": 1, "reason": "Error", "message": '{"level": "info"}\nhoned: the token table is missing\n'}
AGAIN = {"restartCount": 4, "lastState": {"terminated": DIED}}
REFUSED = {"reason": "CreateContainerConfigError", "message": 'secret "x" not found'}


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            {"containerStatuses": [container({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}})]},
            "generation: ImagePullBackOff: no such image",
        ),
        (
            {"containerStatuses": [container({"waiting": {"reason": "CrashLoopBackOff"}}, **AGAIN)]},
            "generation died 4 times (exit code 1: honed: the token table is missing), CrashLoopBackOff",
        ),
        (
            {"containerStatuses": [container({"waiting": REFUSED})]},
            'generation: CreateContainerConfigError: secret "x" not found',
        ),
        (
            {"containerStatuses": [container({"terminated": {"exitCode": 137, "reason": "OOMKilled"}})]},
            "generation ended (OOMKilled, exit code 137)",
        ),
        ({"containerStatuses": [container({"running": {}})]}, "generation runs and is not ready yet"),
        (
            {"containerStatuses": [container({"running": {}}, restartCount=1, lastState={"terminated": DIED})]},
            "generation runs and is not ready yet, after it died (exit code 1: honed: the token table is missing)",
        ),
        (
            {
                "initContainerStatuses": [container({"running": {}}) | {"name": "version"}],
                "containerStatuses": [container({"waiting": {"reason": "PodInitializing"}})],
            },
            "version runs and is not ready yet",
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes: insufficient cpu"}]},
            "no node takes it: 0/1 nodes: insufficient cpu",
        ),
        ({"reason": "Evicted", "message": "The node was low on memory"}, "Evicted: The node was low on memory"),
        ({"containerStatuses": [container({"waiting": {"reason": "ContainerCreating"}})]}, STARTING),
    ],
)
def test_a_pod_says_why_it_is_not_ready(status: dict[str, Any], words: str) -> None:
    assert made(**status).trouble == words


def test_a_ready_pod_has_no_trouble_and_one_that_ends_is_not_ready() -> None:
    assert made(ready=True).trouble == ""
    leaving = made(ready=True)
    leaving.tree["metadata"]["deletionTimestamp"] = "now"
    assert (leaving.ready, leaving.trouble) == (False, "it is ending")


def test_last_words_that_are_long_are_cut() -> None:
    status = container({"terminated": {**DIED, "message": "x" * 2000}})
    assert len(made(containerStatuses=[status]).trouble) == 400


def test_ports_go_by_their_names_and_else_by_what_honed_has() -> None:
    tree = pod("generation")
    tree["spec"]["containers"][0]["ports"] = [{"name": "grpc", "containerPort": 7}]
    assert (Pod(tree).port("grpc"), Pod(tree).port("metrics")) == (7, 9090)


def test_pods_that_have_ended_are_left_out(api: KubernetesApi, cluster: Cluster) -> None:
    api.put("pods", "b", pod("generation"))
    api.put("pods", "a", pod("generation"))
    api.put("pods", "job", pod("generation", ready=False, phase="Succeeded"))
    api.put("pods", "other", pod("reward"))
    assert [each.name for each in list_pods(cluster, "generation")] == ["a", "b"]
    assert len(list_pods(cluster)) == 3


def test_a_missing_secret_is_told_by_the_events(api: KubernetesApi, cluster: Cluster) -> None:
    status = container({"waiting": {"reason": "ContainerCreating"}})
    api.put("pods", "g-1", pod("generation", ready=False, phase="Pending", containerStatuses=[status]))
    for number, text in enumerate(["older", 'MountVolume.SetUp failed: secret "honed-token-table" not found']):
        event = {"type": "Warning", "involvedObject": {"name": "g-1"}, "lastTimestamp": f"2026-01-01T00:00:0{number}Z"}
        api.put("events", f"e{number}", {**event, "message": text})
    [found] = list_pods(cluster)
    assert trouble_of(cluster, found) == f'{STARTING}; MountVolume.SetUp failed: secret "honed-token-table" not found'
    api.forbidden.add(("list", "events"))
    assert trouble_of(cluster, found) == STARTING


def test_no_pod_at_all_is_explained_by_its_workload(api: KubernetesApi, cluster: Cluster) -> None:
    def words(component: str = "generation") -> str:
        return str(none_ready(cluster, component, list_pods(cluster, component)))

    assert "deploy honed there, or name where it is: --cluster CONTEXT/NAMESPACE" in words()
    api.put("deployments", "honed-generation", {"spec": {"replicas": 0}})
    assert "is scaled to 0, by a person or an autoscaler: `honed --cluster scale generation=1` starts one" in words()
    failure = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: cpu"}
    api.put("deployments", "honed-generation", {"spec": {"replicas": 2}, "status": {"conditions": [failure]}})
    assert words() == "there is no generation Pod in namespace kind-test/honed: exceeded quota: cpu"
    api.put("statefulsets", "honed-learner", {"spec": {"replicas": 1}})
    assert "honed-learner has none yet; `kubectl --context kind-test -n honed get events` tells why" in words("learner")
    api.forbidden.add(("get", "deployments"))
    assert "deploy honed there" in words()
