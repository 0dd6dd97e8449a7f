"""Claims about finding a cluster and asking its API server: contexts, credentials, refusals, outages."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from tests.support.kubernetes import CONTEXT, KubernetesApi, kubeconfig

from honed.cluster.api import Cluster, items
from honed.cluster.kubeconfig import NAMESPACE, Context, choose, read_contexts
from honed.kit.errors import Conflict, FailedPrecondition, NotFound, PermissionDenied, Unauthenticated, Unavailable

ARN = "arn:aws:eks:eu-central-1:1:cluster/trained"
CONTEXTS = [Context("kind-a", ""), Context("b", "team"), Context(ARN, "")]


@pytest.mark.parametrize(
    ("asked", "context", "namespace"),
    [
        ("", "kind-a", NAMESPACE),
        ("/", "kind-a", NAMESPACE),
        ("/elsewhere", "kind-a", "elsewhere"),
        ("b", "b", "team"),
        ("b/", "b", "team"),
        ("b/other", "b", "other"),
        (ARN, ARN, NAMESPACE),
        (f"{ARN}/other", ARN, "other"),
    ],
)
def test_a_context_a_namespace_or_both_are_named(asked: str, context: str, namespace: str) -> None:
    found, where = choose(asked, CONTEXTS, "kind-a")
    assert (found.name, where) == (context, namespace)


def test_an_unknown_context_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(FailedPrecondition, match=r"no context 'c': it has arn.*, b, kind-a"):
        choose("c/honed", CONTEXTS, "kind-a")
    with pytest.raises(FailedPrecondition, match="no current context: name one"):
        choose("/honed", CONTEXTS, "")


def test_contexts_of_several_files_are_read_and_the_first_current_one_counts(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("contexts: [{name: a, context: {namespace: x}}]")
    two.write_text("contexts: [{name: a, context: {}}, {name: b, context: {}}]\ncurrent-context: b")
    assert read_contexts([one, two]) == ([Context("a", "x"), Context("b", "")], "b")
    two.write_text("- no kubeconfig")
    with pytest.raises(FailedPrecondition, match="is no kubeconfig"):
        read_contexts([one, two])


def test_without_a_kubeconfig_it_says_how_to_get_one(tmp_path: Path) -> None:
    for environment in ({"KUBECONFIG": str(tmp_path / "none")}, {"HOME": str(tmp_path)}):
        with pytest.raises(FailedPrecondition, match=r"there is no kubeconfig at .*KUBECONFIG"):
            Cluster.of("", environment)


def test_a_pod_without_a_service_account_says_so(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="no usable service account"):
        Cluster.of("", {"HOME": str(tmp_path), "KUBERNETES_SERVICE_HOST": "10.0.0.1"})


def test_a_context_whose_user_is_missing_is_told(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(kubeconfig("http://127.0.0.1:1").replace("name: c\n", "name: d\n", 1))
    with pytest.raises(FailedPrecondition, match=f"context '{CONTEXT}' of the kubeconfig cannot be used: .*clusters"):
        Cluster.of("", {"KUBECONFIG": str(path)})


def test_objects_are_read_made_and_changed(api: KubernetesApi, cluster: Cluster) -> None:
    assert cluster.name == f"{CONTEXT}/{NAMESPACE}"
    assert cluster.find(cluster.core("secrets", "s")) is None
    made = cluster.call("POST", cluster.core("secrets"), {"metadata": {"name": "s"}})
    assert cluster.get(cluster.core("secrets", "s")) == made
    assert [tree["metadata"]["name"] for tree in items(cluster.get(cluster.core("secrets")))] == ["s"]
    with pytest.raises(Conflict, match="already exists"):
        cluster.call("POST", cluster.core("secrets"), {"metadata": {"name": "s"}})
    with pytest.raises(NotFound, match='secrets "t" not found'):
        cluster.get(cluster.core("secrets", "t"))


def test_a_right_that_is_missing_is_named(api: KubernetesApi, cluster: Cluster) -> None:
    api.forbidden.add(("list", "pods"))
    with pytest.raises(
        PermissionDenied, match=r'User "person" cannot list resource "pods": ask who runs the cluster .*kind-test'
    ):
        cluster.get(cluster.core("pods"))


def test_credentials_that_are_not_accepted_lead_to_a_login(api: KubernetesApi, tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(path.read_text().replace("ticket-of-a-person", "expired"))
    stranger = Cluster.of("", {"KUBECONFIG": str(path)})
    with pytest.raises(
        Unauthenticated, match=r"does not accept the credentials of context 'kind-test': log in again.*auth whoami"
    ):
        stranger.get(stranger.core("pods"))


@pytest.mark.parametrize(("status", "headers"), [(429, {"Retry-After": "0"}), (503, {}), (500, {})])
def test_overload_is_waited_out(api: KubernetesApi, cluster: Cluster, status: int, headers: dict[str, str]) -> None:
    api.answers = [(status, headers)]
    assert cluster.get(cluster.core("pods")) == {"items": []}
    assert len(api.requests) == 2


def test_overload_that_stays_is_told(api: KubernetesApi, cluster: Cluster) -> None:
    api.answers = [(503, {})] * 3
    with pytest.raises(Unavailable, match="answers 503: asked for by the test; try again"):
        cluster.get(cluster.core("pods"))
    assert len(api.requests) == 3


def test_a_server_that_is_away_is_named_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    path = tmp_path / "kubeconfig"
    path.write_text(kubeconfig(f"http://127.0.0.1:{port}"))
    gone = Cluster.of("/honed", {"KUBECONFIG": str(path)})
    with pytest.raises(
        Unavailable, match=rf"127.0.0.1:{port} of context 'kind-test' does not answer .*refused.*kubectl --context"
    ):
        gone.get(gone.core("pods"))


def test_what_is_asked_briefly_ends_in_that_time_and_is_not_tried_again(api: KubernetesApi, cluster: Cluster) -> None:
    api.put("pods", "g-1", {})
    with cluster.briefly(30) as brief:
        assert brief.get(brief.core("pods", "g-1"))["metadata"]["name"] == "g-1"
    api.answers = [(503, {})]
    with cluster.briefly(30) as brief, pytest.raises(Unavailable, match="answers 503"):
        brief.get(brief.core("pods"))
    api.hanging, begun, asked = True, time.monotonic(), len(api.requests)
    with cluster.briefly(0.5) as brief:
        for _ in range(20):
            with pytest.raises(Unavailable, match="does not answer"):
                brief.get(brief.core("pods"))
    assert time.monotonic() - begun < 5
    assert len(api.requests) - asked < 20, "once the time is over nobody is asked"
    api.hanging = False
    assert cluster.get(cluster.core("pods"))["items"], "the cluster itself is as it was"


@pytest.mark.parametrize("page", ["<html>log in</html>", "[]", "", "null"])
def test_an_answer_that_is_no_object_is_not_the_api_servers(api: KubernetesApi, cluster: Cluster, page: str) -> None:
    api.page = page
    with pytest.raises(Unavailable, match=r"API server .* does not answer \(status 200 with no JSON object: a proxy"):
        cluster.get(cluster.core("pods"))
