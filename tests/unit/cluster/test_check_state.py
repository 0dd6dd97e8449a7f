"""Claims about `honed --cluster … check`: what a namespace lacks, and what its Pods say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.kubernetes import KubernetesApi, pod
from tests.unit.cluster.test_check import changed, cluster_tree
from typer.testing import CliRunner

from honed.check.cluster_state import check_state
from honed.check.findings import Report
from honed.cli.main import app
from honed.cluster.api import Cluster
from honed.config import RunSettings

OF_STORE = ("generation", "reward", "conductor")
LABELS = {"metadata": {"labels": {"app.kubernetes.io/name": "honed"}}}


def template(component: str, *, store: str = "honed-store") -> dict[str, Any]:
    """What the manifests say of a service's Pods, as far as it matters here."""
    tokens = [{"secret": {"name": "honed-token-table"}}, {"secret": {"name": f"honed-token-{component}"}}]
    return {
        "initContainers": [{"name": "version"}],
        "containers": [
            {
                "name": component,
                "volumeMounts": [{"name": "store", "mountPath": "/var/lib/honed/policy"}] if store else [],
                "env": [
                    {"name": "A", "valueFrom": {"secretKeyRef": {"name": "honed-extra", "key": "a", "optional": True}}},
                    {"name": "B", "valueFrom": {"secretKeyRef": {"name": "honed-object-store", "key": "b"}}},
                ],
            }
        ],
        "volumes": [
            {"name": "tokens", "projected": {"sources": tokens}},
            {"name": "redis", "secret": {"secretName": "honed-redis"}},
            *([{"name": "store", "persistentVolumeClaim": {"claimName": store}}] if store else []),
        ],
    }


def deploy(api: KubernetesApi, component: str, kind: str = "deployments", replicas: int = 1, **options: Any) -> None:
    spec = {"replicas": replicas, "template": {"spec": template(component, **options)}}
    api.put(kind, f"honed-{component}", {**LABELS, "spec": spec})


@pytest.fixture
def deployed(api: KubernetesApi) -> KubernetesApi:
    """A namespace where nothing is wrong."""
    for component in OF_STORE:
        deploy(api, component)
    deploy(api, "learner", "statefulsets")
    job = {"jobTemplate": {"spec": {"template": {"spec": template("learner")}}}}
    api.put("cronjobs", "honed-pretrain", {**LABELS, "spec": job})
    for name in (*OF_STORE, "learner", "table"):
        api.secret(f"honed-token-{name}", x="x")
    for name in ("honed-redis", "honed-object-store"):
        api.secret(name, password="x")
    api.put("persistentvolumeclaims", "honed-store", {"status": {"phase": "Bound"}})
    api.put("pods", "honed-generation-a", pod("generation"))
    return api


def found(cluster: Cluster, **sections: Any) -> list[str]:
    tree = {**changed("policy.url", "/var/lib/honed/policy"), **sections}
    report = Report()
    check_state(RunSettings.model_validate(tree), cluster, report)
    return [f"{finding.severity} {finding.where}: {finding.text}" for finding in report.findings]


def test_a_namespace_with_everything_has_no_finding(deployed: KubernetesApi, cluster: Cluster) -> None:
    assert found(cluster) == []


def test_a_missing_secret_is_named_with_who_makes_it(deployed: KubernetesApi, cluster: Cluster) -> None:
    deployed.remove("secrets", "honed-token-learner")
    deployed.remove("secrets", "honed-object-store")
    own, made = found(cluster)
    assert own.startswith("error Secret honed-object-store: is missing in namespace kind-test/honed")
    assert own.endswith("Pods wait for it: make it")
    assert made.endswith("`honed --cluster kind-test/honed cluster secrets` makes it")


def test_before_anything_is_applied_the_usual_secrets_are_looked_for(api: KubernetesApi, cluster: Cluster) -> None:
    texts = found(cluster)
    assert "has no workload of honed yet" in texts[0]
    named = [text.split(":")[0] for text in texts[1:]]
    assert named == [f"error Secret honed-{name}" for name in (
        "redis", "token-conductor", "token-generation", "token-learner", "token-preference", "token-reward", "token-table"
    )]  # fmt: skip


def test_volumes_that_are_missing_or_lost_are_named(deployed: KubernetesApi, cluster: Cluster) -> None:
    deployed.put("persistentvolumeclaims", "honed-store", {"status": {"phase": "Pending"}})
    [pending] = found(cluster)
    assert pending.startswith("warning PersistentVolumeClaim honed-store: has no volume yet")
    deployed.put("persistentvolumeclaims", "honed-store", {"status": {"phase": "Lost"}})
    assert "has lost its volume" in found(cluster)[0]
    deployed.remove("persistentvolumeclaims", "honed-store")
    assert found(cluster) == [
        "error PersistentVolumeClaim honed-store: is missing in namespace kind-test/honed: apply the overlay again"
    ]


def test_a_claim_that_a_stateful_set_makes_itself_need_not_be_there(deployed: KubernetesApi, cluster: Cluster) -> None:
    spec = {"volumeClaimTemplates": [{"metadata": {"name": "own"}}], "template": {"spec": template("learner")}}
    deployed.put("statefulsets", "honed-learner", {**LABELS, "spec": spec})
    assert found(cluster) == []


def test_a_store_that_the_pods_do_not_share_is_refused(deployed: KubernetesApi, cluster: Cluster) -> None:
    deploy(deployed, "reward", store="")
    [lacking] = found(cluster)
    assert lacking.startswith("error policy.url: is /var/lib/honed/policy, and no volume is mounted there in honed-reward")
    deploy(deployed, "reward", store="other")
    deployed.put("persistentvolumeclaims", "other", {"status": {"phase": "Bound"}})
    [different] = found(cluster)
    assert "mount different volumes" in different


def test_sqlite_with_several_replicas_is_refused(deployed: KubernetesApi, cluster: Cluster) -> None:
    deploy(deployed, "preference", replicas=2)
    deployed.secret("honed-token-preference", x="x")
    preference = {**cluster_tree()["preference"], "database_url": None}
    [finding] = found(cluster, preference=preference)
    assert finding.startswith(
        "error preference.database_url: is SQLite, which has one writer, and honed-preference has 2 replicas"
    )


def test_a_store_that_cannot_be_reached_from_here_is_a_warning(deployed: KubernetesApi, cluster: Cluster) -> None:
    [finding] = found(cluster, policy={"url": "nosuchstore://bucket/path"})
    assert finding.startswith("warning policy.url: nosuchstore://bucket/path cannot be written from this machine")


def test_a_pod_that_is_not_ready_says_why(deployed: KubernetesApi, cluster: Cluster) -> None:
    last = {"terminated": {"exitCode": 75, "reason": "Error", "message": "honed: the policy store s3://b does not answer"}}
    state = {"waiting": {"reason": "CrashLoopBackOff"}}
    status = {"name": "learner", "restartCount": 3, "state": state, "lastState": last}
    deployed.put("pods", "honed-learner-0", pod("learner", ready=False, containerStatuses=[status]))
    [finding] = found(cluster)
    assert finding.startswith(
        "error Pod honed-learner-0: is not ready: learner died 3 times (exit code 75: honed: the policy store"
    )


def test_what_may_not_be_read_is_a_warning(deployed: KubernetesApi, cluster: Cluster) -> None:
    deployed.forbidden |= {("get", "secrets"), ("list", "deployments")}
    texts = found(cluster)
    assert [text.split(": ")[0] for text in texts] == ["warning cluster"] * 3
    assert "the workloads could not be checked" in texts[0]
    assert "Secrets could not be checked" in texts[2]


def test_the_command_looks_into_the_namespace_that_is_named(deployed: KubernetesApi, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed("policy.url", "/var/lib/honed/policy")))
    environment = {"KUBECONFIG": str(tmp_path / "kubeconfig")}
    assert CliRunner().invoke(app, ["--cluster", "check", str(path)], env=environment).exit_code == 0
    deployed.remove("secrets", "honed-redis")
    done = CliRunner().invoke(app, ["--cluster", "kind-test/honed", "check", str(path), "--cluster"], env=environment)
    assert (done.exit_code, "Secret honed-redis" in done.stdout) == (1, True)
