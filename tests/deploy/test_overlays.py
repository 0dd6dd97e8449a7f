"""Every overlay renders, and is what the API servers of the newest minor versions take."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions
from packaging.version import Version
from tests.deploy.manifests import (
    CUSTOM,
    DEPLOY,
    OVERLAYS,
    Workload,
    named,
    of_kind,
    overlay,
    render,
    run_settings,
    run_tree,
    selects,
    workloads,
)

from honed.check.cluster import check_cluster
from honed.config import RunSettings
from honed.queue.admission import AdmissionPolicy, LoopState
from honed.queue.keys import PROMPTS, ROLLOUTS, RunKeys
from honed.reward.main import _GROUP
from honed.reward.worker import _GROUPS
from honed.settings_file import load_settings
from honed.workspace import Workspace

MINORS = sorted({".".join(text.split(".")[:2]) for text in all_versions()}, key=Version)[-3:]
BASE = DEPLOY / "base"
NAMESPACE_LABEL = "kubernetes.io/metadata.name"


@pytest.mark.parametrize("minor", MINORS)
@pytest.mark.parametrize("name", [*OVERLAYS, "base"])
def test_kubernetes_takes_it(name: str, minor: str) -> None:
    for tree in render(BASE) if name == "base" else overlay(name):
        if not tree["apiVersion"].startswith(CUSTOM):
            kubernetes_validate.validate(tree, minor, strict=True)


def test_a_wrong_field_is_found() -> None:
    tree = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"clusterIp": "None"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(tree, MINORS[-1], strict=True)


def test_what_a_plain_cluster_lacks_is_in_components_alone() -> None:
    for trees in (render(BASE), overlay("local-cpu"), overlay("gpu")):
        assert not [tree for tree in trees if tree["apiVersion"].startswith(CUSTOM)]
    assert {tree["apiVersion"].partition("/")[0] for tree in overlay("production")} >= set(CUSTOM)


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_object_stands_there_twice(name: str) -> None:
    names = [(tree["kind"], tree["metadata"]["name"]) for tree in overlay(name)]
    assert len(names) == len(set(names))


def texts(tree: object) -> Iterator[tuple[str, str]]:
    """Every text of a tree, with the key that it stands under."""
    match tree:
        case dict():
            for key, value in tree.items():
                yield from ((key, value),) if isinstance(value, str) else texts(value)
        case list():
            for value in tree:
                yield from texts(value)


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_copy_in_another_namespace_speaks_of_no_other(name: str, tmp_path: Path) -> None:
    """As deploy/README.md has it: copy an overlay and change `namespace`."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    file = tmp_path / "deploy" / "overlays" / name / "kustomization.yaml"
    file.write_text(file.read_text().replace("\nnamespace: honed\n", "\nnamespace: elsewhere\n"))
    trees = render(file.parent)
    assert "elsewhere" in {tree["metadata"]["name"] for tree in of_kind(trees, "Namespace")}
    for tree in trees:
        for subject in (row for row in tree.get("subjects", []) if row["kind"] == "ServiceAccount"):
            assert subject["namespace"] == "elsewhere", tree["metadata"]["name"]
        for key, value in texts(tree):
            assert not (key == "namespace" and value == "honed"), tree["metadata"]["name"]
            assert not re.search(r"\.honed(\.svc|[:/]|$)", value), (tree["metadata"]["name"], value)
    for tree in of_kind(trees, "ScaledObject"):
        addresses = [t["metadata"]["address"] for t in tree["spec"]["triggers"] if t["type"] == "redis-streams"]
        assert addresses == ["honed-redis.elsewhere.svc:6379"]


def test_the_component_scorers_lets_the_reward_service_out_and_nobody_else(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    file = tmp_path / "deploy" / "overlays" / "local-cpu" / "kustomization.yaml"
    file.write_text(file.read_text().replace("components:\n", "components:\n  - ../../components/scorers\n"))
    [policy] = [p["spec"] for p in of_kind(render(file.parent), "NetworkPolicy") if p["metadata"]["name"] == "honed-scorers"]
    assert {w.component for w in workloads("local-cpu") if selects(policy["podSelector"], w.labels)} == {"reward"}
    [rule] = policy["egress"]
    assert [row["port"] for row in rule["ports"]] == [443, 50051]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_run_file_is_one_that_a_cluster_honours(name: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_tree(name)))
    settings, report = check_cluster(file)
    assert report.errors == []
    known = {"preference.database_url", "policy.url"}  # a volume where the overlay mounts one, and PostgreSQL by environment
    assert {finding.where for finding in report.findings} <= known
    assert settings.conductor.launcher == "kubernetes"
    assert settings.learner.steps is None
    for part in ("generation", "reward", "preference", "learner", "conductor"):
        section = getattr(settings, part)
        assert section.host == "0.0.0.0"
        assert section.address == f"dns:///honed-{part}:{section.port}"
        assert named(overlay(name), "Service", f"honed-{part}")["spec"]["clusterIP"] == "None"
    files = [settings.data.prompts, *settings.data.texts, *(row.file for row in settings.data.judgements)]
    assert all(str(file).startswith("/data/") for file in files)
    assert str(settings.directory) == "/var/lib/honed"
    assert str(settings.tokens_directory) == "/etc/honed/tokens"
    assert str(settings.queue.password_file) == "/etc/honed/redis/password"


def test_the_store_on_a_volume_is_where_the_run_file_says() -> None:
    settings = run_settings("local-cpu")
    assert settings.policy_url == str(Workspace(settings.directory).policy_store)
    for kind, name in (("Deployment", "generation"), ("Deployment", "reward"), ("StatefulSet", "learner")):
        [container] = named(overlay("local-cpu"), kind, f"honed-{name}")["spec"]["template"]["spec"]["containers"]
        [mount] = [m for m in container["volumeMounts"] if m["name"] == "store"]
        assert mount["mountPath"] == settings.policy_url


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_changed_run_file_rolls_what_mounts_it(name: str) -> None:
    [config] = [t for t in of_kind(overlay(name), "ConfigMap") if "run.yaml" in t["data"]]
    text = yaml.safe_dump_all(overlay(name))
    assert config["metadata"]["name"] != "honed-run"
    assert "name: honed-run\n" not in text
    for kind, workload in (("Deployment", "generation"), ("StatefulSet", "learner"), ("CronJob", "pretrain")):
        assert config["metadata"]["name"] in yaml.safe_dump(named(overlay(name), kind, f"honed-{workload}"))


def test_the_autoscalers_look_at_the_streams_of_the_run() -> None:
    keys = RunKeys(run_tree("production")["run"])
    for service, stage in (("generation", PROMPTS), ("reward", ROLLOUTS)):
        scaled = named(overlay("production"), "ScaledObject", f"honed-{service}")["spec"]
        trigger = scaled["triggers"][0]
        assert trigger["type"] == "redis-streams"
        assert trigger["metadata"]["stream"] == keys.stream(stage)
        # With a group KEDA takes what is pending or the lag, and not the length.
        assert not {"consumerGroup", "lagCount", "pendingEntriesCount"} & set(trigger["metadata"])
        deployment = named(overlay("production"), "Deployment", scaled["scaleTargetRef"]["name"])
        assert "replicas" not in deployment["spec"]


def test_the_gateway_speaks_tls_to_services_that_take_nothing_else() -> None:
    trees = overlay("production")
    gateway, route = named(trees, "Gateway", "honed-public")["spec"], named(trees, "GRPCRoute", "honed-public")["spec"]
    assert route["hostnames"] == [listener["hostname"] for listener in gateway["listeners"]]
    assert route["hostnames"] != ["honed.example.com"]  # the component's own, which the overlay changes in both
    called = {backend["name"] for rule in route["rules"] for backend in rule["backendRefs"]}
    policy = named(trees, "BackendTLSPolicy", "honed-public")["spec"]
    assert {target["name"] for target in policy["targetRefs"]} == called
    assert not [port for name in called for port in named(trees, "Service", name)["spec"]["ports"] if "appProtocol" in port]
    # One authority for both sides: what cert-manager makes of it has the authority's own certificate beside it.
    shown = gateway["tls"]["backend"]["clientCertificateRef"]
    assert policy["validation"]["caCertificateRefs"] == [shown]
    [own] = [t["spec"] for t in of_kind(trees, "Certificate") if t["spec"]["secretName"] == shown["name"]]
    assert "client auth" in own["usages"]
    for service in ("generation", "reward"):
        certificate = named(trees, "Certificate", f"honed-tls-{service}")["spec"]
        assert certificate["issuerRef"] == own["issuerRef"]
        assert policy["validation"]["hostname"] in certificate["dnsNames"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_run_can_be_deleted_without_what_all_runs_share(name: str) -> None:
    """By its namespace, as deploy/README.md says: nothing else is outside of it but what it names there."""
    outside = {t["kind"] for t in overlay(name) if "namespace" not in t["metadata"]} - {"Namespace"}
    text = (DEPLOY / "README.md").read_text().partition("**Several runs in one cluster**")[2].partition("\n## ")[0]
    assert {kind for kind in ("PriorityClass", "PersistentVolume") if kind in text} >= outside
    assert all(f"`{tree['metadata']['name']}`" in text for tree in of_kind(overlay(name), "PriorityClass"))
    assert "kubectl delete namespace honed" in text


def scalers() -> Iterator[tuple[str, str, int, int]]:
    """For component and service: the target of the stream's length, and the most replicas."""
    for service in ("generation", "reward"):
        spec = named(overlay("production"), "ScaledObject", f"honed-{service}")["spec"]
        yield "keda", service, int(spec["triggers"][0]["metadata"]["streamLength"]), spec["maxReplicaCount"]
    for tree in yaml.safe_load_all((DEPLOY / "components" / "hpa" / "scaling.yaml").read_text()):
        service, spec = tree["metadata"]["name"].removeprefix("honed-"), tree["spec"]
        [external] = [metric["external"] for metric in spec["metrics"] if metric["type"] == "External"]
        stage = {"generation": PROMPTS, "reward": ROLLOUTS}[service]
        assert external["metric"]["selector"]["matchLabels"] == {"stage": stage}
        yield "hpa", service, int(external["target"]["averageValue"]), spec["maxReplicas"]


@pytest.mark.parametrize(("component", "service", "target", "most"), scalers())
def test_what_admission_lets_in_is_work_for_more_replicas(component: str, service: str, target: int, most: int) -> None:
    settings = run_settings("production")
    conductor, learner = settings.conductor, settings.learner
    policy = AdmissionPolicy(learner.batch, learner.max_staleness, conductor.max_in_flight, conductor.samples_per_prompt)
    nothing = LoopState(update=0, served=0, waiting=0, running=0)
    longest = policy.prompts(nothing) if service == "generation" else policy.capacity(nothing)
    assert math.ceil(longest / target) >= most, component
    # A replica that has all that it can hold and leaves something waiting asks for another one.
    held = (
        settings.generation.rollout_concurrency / conductor.samples_per_prompt if service == "generation" else _GROUPS * _GROUP
    )
    assert target <= held
    # The defaults too let more than one replica of reward work.
    defaults = RunSettings.model_validate({"conductor": {"samples_per_prompt": 1}})
    admitted = AdmissionPolicy(defaults.learner.batch, defaults.learner.max_staleness, defaults.conductor.max_in_flight)
    assert service != "reward" or math.ceil(admitted.capacity(nothing) / target) > 1


def test_reward_scales_to_zero_when_nothing_trains() -> None:
    spec = named(overlay("production"), "ScaledObject", "honed-reward")["spec"]
    stream, learner = spec["triggers"]
    assert spec["minReplicaCount"] == 0
    assert "activationLagCount" not in stream["metadata"]  # one rollout that is left brings a replica back
    selector = dict(row.split("=") for row in learner["metadata"]["podSelector"].split(","))
    assert learner["type"] == "kubernetes-workload"
    assert [w.component for w in workloads("production") if selects({"matchLabels": selector}, w.labels)] == ["learner"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_traces_go_where_the_policy_lets_them_by_settings_that_the_services_take(name: str) -> None:
    policies = [p["spec"] for p in of_kind(overlay(name), "NetworkPolicy") if p["metadata"]["name"] == "honed-tracing"]
    tracing = {"generation", "reward", "preference", "learner", "conductor", "job"}
    for workload in workloads(name):
        given = {row["name"]: row.get("value") for row in workload.containers[0].get("env", [])}
        endpoint = given.get("HONED_TELEMETRY__OTLP_ENDPOINT")
        assert (endpoint is not None) is (bool(policies) and workload.component in tracing), workload
        if endpoint is not None:
            settings = load_settings(None, {"HONED_TELEMETRY__OTLP_ENDPOINT": endpoint})
            url = urlsplit(str(settings.telemetry.otlp_endpoint))
            [rule] = policies[0]["egress"]
            assert [row["port"] for row in rule["ports"]] == [url.port]
            assert str(url.hostname).split(".")[1] == rule["to"][0]["namespaceSelector"]["matchLabels"][NAMESPACE_LABEL]
    assert bool(policies) is (name == "production")


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_component_learner_data_gives_the_learner_the_data_that_jobs_have(name: str, tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    file = tmp_path / "deploy" / "overlays" / name / "kustomization.yaml"
    file.write_text(file.read_text().replace("\ncomponents:\n", "\ncomponents:\n  - ../../components/learner-data\n"))
    trees = render(file.parent)
    learner = Workload(name, named(trees, "StatefulSet", "honed-learner"))
    job = Workload(name, named(trees, "CronJob", "honed-pretrain"))
    copies = [next(c for c in each.pod["initContainers"] if c["name"] == "data") for each in (learner, job)]
    assert [copy["image"] for copy in copies] == [copies[1]["image"]] * 2
    assert copies[0]["command"] == copies[1]["command"]
    mounts = [next(m for m in each.containers[0]["volumeMounts"] if m["name"] == "data") for each in (learner, job)]
    assert mounts[0] == mounts[1]
    kubernetes_validate.validate(learner.tree, MINORS[-1], strict=True)


def test_the_conductor_tracks_where_the_policy_lets_it_with_a_secret_that_need_not_be_there() -> None:
    given: dict[str, tuple[str, object]] = {}
    for workload in workloads("production"):
        container = workload.containers[0]
        values = {row["name"]: row.get("value") for row in container.get("env", [])}
        if uri := values.get("HONED_TRACKING__MLFLOW__URI"):
            given[workload.component] = uri, container.get("envFrom")
    assert list(given) == ["conductor"]
    uri, sources = given["conductor"]
    settings = load_settings(None, {"HONED_TRACKING__MLFLOW__URI": uri})
    assert settings.tracking.mlflow is not None
    [rule] = named(overlay("production"), "NetworkPolicy", "honed-tracking")["spec"]["egress"]
    url = urlsplit(str(settings.tracking.mlflow.uri))
    assert [row["port"] for row in rule["ports"]] == [url.port]
    assert str(url.hostname).split(".")[1] == rule["to"][0]["namespaceSelector"]["matchLabels"][NAMESPACE_LABEL]
    assert sources == [{"secretRef": {"name": "honed-tracking", "optional": True}}]


def test_the_volumes_of_one_node_hold_every_claim() -> None:
    volumes, claims = of_kind(overlay("local-cpu"), "PersistentVolume"), of_kind(overlay("local-cpu"), "PersistentVolumeClaim")
    assert len(volumes) >= len(claims)
    # A claim without a class takes a volume without one, where the cluster has no default; both must stay without.
    assert not [tree for tree in (*volumes, *claims) if "storageClassName" in tree["spec"]]
    assert {tree["spec"]["persistentVolumeReclaimPolicy"] for tree in volumes} == {"Retain"}
    # All are one directory of the node, so that each mount is told apart by its place below.
    places: dict[str, str] = {}
    for tree in of_kind(overlay("local-cpu"), "Deployment", "StatefulSet", "CronJob"):
        spec = tree["spec"]
        pod = (spec["jobTemplate"]["spec"] if tree["kind"] == "CronJob" else spec)["template"]["spec"]
        claimed = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            for mount in container["volumeMounts"]:
                if mount["name"] in claimed:
                    claim = claimed[mount["name"]]
                    assert places.setdefault(mount["subPathExpr"], claim) == claim
                    assert mount["subPathExpr"].startswith("honed/$(POD_NAMESPACE)/")
                    assert "POD_NAMESPACE" in {row["name"] for row in container["env"]}
    assert set(places.values()) == {claim["metadata"]["name"] for claim in claims}
