"""What holds for each workload of each overlay."""

from __future__ import annotations

import math
import os
import re
import tomllib
from typing import Any

import pytest
from tests.deploy.manifests import (
    COMPONENT,
    DEPLOY,
    ENDING,
    NAMESPACE,
    OVERLAYS,
    SERVING,
    Workload,
    every_workload,
    named,
    of_kind,
    overlay,
    run_settings,
    selects,
)

from honed.conductor.cluster.outcome import KILLED
from honed.conductor.launcher import STOP_S
from honed.reward.registry import _KEPT_BESIDE
from honed.reward.sources import _COPIES_KEPT
from honed.runtime import LINGER_S
from honed.settings import ServerSettings
from honed.topology import SERVICES

RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
"""https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
TORCH = {"generation", "reward", "learner", "job"}
CALLS_THE_API = {"conductor", "secrets"}
GPU_OVERLAYS = ("gpu", "production")
BRINGS_SECRETS = {"production"}
UNITS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
TOKENS = {"generation": "generation", "reward": "reward", "preference": "preference", "learner": "learner",
          "conductor": "conductor", "job": "learner"}  # fmt: skip
PARTS = {
    ("gpu", "Job", "honed-secrets"), ("gpu", "Job", "honed-migrate"), ("gpu", "StatefulSet", "honed-postgres"),
    ("gpu", "StatefulSet", "honed-minio"), ("local-cpu", "Job", "honed-secrets"), ("production", "Job", "honed-migrate"),
    ("production", "CronJob", "honed-backup-database"), ("production", "CronJob", "honed-backup-store"),
}  # fmt: skip

everyone = pytest.mark.parametrize("workload", every_workload(), ids=str)
serving = pytest.mark.parametrize("workload", every_workload(*SERVING), ids=str)


def quantity(text: object) -> float:
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    assert match is not None, text
    return float(match[1]) * UNITS[match[2]]


def test_the_overlays_have_the_workloads_of_a_run() -> None:
    found = {(w.overlay, w.kind, w.name) for w in every_workload()}
    for name in OVERLAYS:
        assert {
            (name, "Deployment", "honed-generation"), (name, "Deployment", "honed-reward"),
            (name, "Deployment", "honed-preference"), (name, "StatefulSet", "honed-learner"),
            (name, "Deployment", "honed-conductor"), (name, "StatefulSet", "honed-redis"),
            (name, "CronJob", "honed-pretrain"), (name, "CronJob", "honed-reward-model"),
        } <= found  # fmt: skip
    assert found >= PARTS


@everyone
def test_pod_security_restricted(workload: Workload) -> None:
    pod, security = workload.pod, workload.pod["securityContext"]
    assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"]["type"] == "RuntimeDefault"
    assert not security.get("sysctls")
    for volume in pod.get("volumes", []):
        assert set(volume) - {"name"} <= RESTRICTED_VOLUMES, volume
    for container in workload.every_container:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert own["readOnlyRootFilesystem"] is True
        assert not set(own) & {"privileged", "procMount", "runAsUser", "runAsNonRoot", "seccompProfile", "seLinuxOptions"}
        assert not any("hostPort" in port for port in container.get("ports", []))


@everyone
def test_requests_and_limits(workload: Workload) -> None:
    for container in workload.every_container:
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory", "ephemeral-storage"} <= set(requests) & set(limits), container["name"]
        assert all(quantity(requests[key]) <= quantity(limits[key]) for key in requests), container["name"]
    limits = workload.containers[0]["resources"]["limits"]
    for volume in workload.pod.get("volumes", []):
        if "emptyDir" not in volume:
            continue
        directory = volume["emptyDir"]
        assert "sizeLimit" in directory, volume["name"]
        # What a pod may write must be reached before the pod is evicted for it.
        limit = limits["memory" if directory.get("medium") == "Memory" else "ephemeral-storage"]
        assert quantity(directory["sizeLimit"]) <= quantity(limit), (volume["name"], limit)


@everyone
def test_a_pod_may_fill_its_volumes_all_at_once(workload: Workload) -> None:
    """Its limit of ephemeral storage is for all of them together; the init containers write into the same volumes."""
    disks = [v["emptyDir"] for v in workload.pod.get("volumes", []) if "emptyDir" in v]
    room = sum(quantity(disk["sizeLimit"]) for disk in disks if disk.get("medium") != "Memory")
    assert room <= sum(quantity(c["resources"]["limits"]["ephemeral-storage"]) for c in workload.containers)
    for container in workload.pod.get("initContainers", []):
        written = {mount["name"] for mount in container["volumeMounts"]} & {"data"}
        limit = quantity(container["resources"]["limits"]["ephemeral-storage"])
        assert all(quantity(workload.volume(name)["emptyDir"]["sizeLimit"]) <= limit for name in written)


@pytest.mark.parametrize("name", GPU_OVERLAYS)
def test_a_model_of_three_billion_parameters_fits(name: str) -> None:
    """As overlays/gpu/run.yaml says: in float32 at worst, copied with the data by conductor and jobs, and scored with."""
    parameters = 3e9
    found = [w for w in every_workload() if w.overlay == name]
    copying = [w for w in found if any(v["name"] == "data" and "emptyDir" in v for v in w.pod["volumes"])]
    assert {w.name for w in copying} >= {"honed-conductor", "honed-pretrain", "honed-reward-model"}
    for workload in (w for w in copying if w.component in {"conductor", "job"}):
        assert quantity(workload.volume("data")["emptyDir"]["sizeLimit"]) >= 4 * parameters + 2**30, workload
    [reward] = [w for w in found if w.component == "reward"]
    [container] = reward.containers
    in_memory = 1 + _KEPT_BESIDE + 1  # the serving one, those beside it, and one that is being loaded
    on_disk = _COPIES_KEPT + 1  # and one that is being fetched
    assert quantity(container["resources"]["limits"]["memory"]) >= in_memory * 4 * parameters + 2 * 2**30
    assert quantity(reward.volume("state")["emptyDir"]["sizeLimit"]) >= on_disk * 4 * parameters


@everyone
def test_a_service_account_of_its_own_and_a_token_only_where_the_api_is_called(workload: Workload) -> None:
    account = workload.pod["serviceAccountName"]
    assert account == f"honed-{workload.component}"
    tree = named(overlay(workload.overlay), "ServiceAccount", account)
    assert tree["automountServiceAccountToken"] is False
    assert workload.pod["automountServiceAccountToken"] is (workload.component in CALLS_THE_API)


TRACKING = [{"secretRef": {"name": "honed-tracking", "optional": True}}]


@everyone
def test_nothing_secret_in_the_open(workload: Workload) -> None:
    """Secrets come as files, which change under a running pod; in an argument or a variable they do not, and they show."""
    for container in workload.every_container:
        # MLflow and Weights & Biases read credentials from the environment alone.
        assert container.get("envFrom", TRACKING) == TRACKING
        assert "envFrom" not in container or container["name"] == "conductor"
        for row in container.get("env", []):
            assert "secretKeyRef" not in row.get("valueFrom", {}), row["name"]
            assert not re.search(r"://[^/@]*:[^/@]+@", row.get("value", "")), row["name"]
        assert not re.search(r"password|token\b", " ".join([*container.get("command", []), *container.get("args", [])]), re.I)
    for volume in workload.pod.get("volumes", []):
        for source in (volume.get("secret"), volume.get("projected")):
            assert source is None or source["defaultMode"] == 0o440, volume["name"]


@everyone
def test_each_service_sees_its_own_token_and_no_other(workload: Workload) -> None:
    tokens = {(name, key) for name, key in workload.secrets() if name.startswith("honed-token-")}
    own = TOKENS.get(workload.component)
    if own is None:
        assert tokens == set()
        return
    serves = workload.component != "job"
    table = {("honed-token-table", "table.json")} if serves else set()
    assert tokens == {(f"honed-token-{own}", f"{own}.token")} | table


@everyone
def test_secrets_are_made_or_documented(workload: Workload) -> None:
    """What no Job and no controller of the overlay makes stands in deploy/README.md."""
    trees, readme = overlay(workload.overlay), (DEPLOY / "README.md").read_text()
    certificates = {tree["spec"]["secretName"] for tree in of_kind(trees, "Certificate")}
    made = set()
    if workload.overlay not in BRINGS_SECRETS:
        [rule] = [r for r in named(trees, "Role", "honed-secrets")["rules"] if "resourceNames" in r]
        made = set(rule["resourceNames"])
    for name, _ in workload.secrets():
        assert name in certificates | made or f"`{name}`" in readme, name


@everyone
def test_the_image_is_pinned_and_local_images_are_used(workload: Workload) -> None:
    version = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["version"]
    for container in workload.every_container:
        name, _, tag = container["image"].rpartition(":")
        assert name
        assert tag != "latest"
        if re.search(r"(^|/)honed(-(generation-(cpu|cuda)|learner-(cpu|cuda)|reward|redis|demo-data))?$", name):
            assert tag == version, container["image"]
        assert container["imagePullPolicy"] == "IfNotPresent"


@everyone
def test_why_it_ended_is_seen(workload: Workload) -> None:
    assert all(c["terminationMessagePolicy"] == "FallbackToLogsOnError" for c in workload.every_container)


@everyone
def test_no_variables_of_services_and_a_place_to_write(workload: Workload) -> None:
    assert workload.pod["enableServiceLinks"] is False  # HONED_..._PORT would be read as settings
    for container in workload.containers:
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert "emptyDir" in workload.volume(mounts["/tmp"])
        if workload.component in TORCH:
            assert workload.volume(mounts["/dev/shm"])["emptyDir"]["medium"] == "Memory"


@everyone
def test_a_priority_class_of_the_overlay(workload: Workload) -> None:
    named(overlay(workload.overlay), "PriorityClass", workload.pod["priorityClassName"])


@everyone
def test_policies_select_it(workload: Workload) -> None:
    policies = of_kind(overlay(workload.overlay), "NetworkPolicy")
    about = [p for p in policies if selects(p["spec"]["podSelector"], workload.labels)]
    assert {kind for p in about for kind in p["spec"]["policyTypes"]} == {"Ingress", "Egress"}
    [deny] = [p for p in about if p["metadata"]["name"] == "honed-default-deny"]
    assert not deny["spec"].get("ingress")
    assert not deny["spec"].get("egress")


@serving
def test_probes(workload: Workload) -> None:
    [container] = workload.containers
    probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    if workload.component in SERVICES:
        section: ServerSettings = getattr(run_settings(workload.overlay), workload.component)
        service = SERVICES[workload.component].grpc_name
        assert all(probe["grpc"]["port"] == section.health_port for probe in probes.values())
        assert probes["readiness"]["grpc"]["service"] == service
        assert "service" not in probes["liveness"]["grpc"]  # the empty name: its loops beat
    # A busy node is no reason to kill: liveness gives it a minute at least, start-up five.
    assert budget(probes["liveness"]) >= 60
    assert budget(probes["startup"]) >= 300
    assert all(probe["timeoutSeconds"] >= 5 for probe in probes.values())


def budget(probe: dict[str, Any]) -> float:
    return float(probe["periodSeconds"] * probe["failureThreshold"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_generator_has_the_time_to_load(name: str) -> None:
    """Until readiness: an engine's start, and a version that fills its volume from the store at 100 MB/s."""
    [workload] = [w for w in every_workload("Deployment") if (w.overlay, w.component) == (name, "generation")]
    [container] = workload.containers
    assert container["startupProbe"]["grpc"]["service"] == SERVICES["generation"].grpc_name
    fetched = quantity(workload.volume("state")["emptyDir"]["sizeLimit"]) / 2 / 100e6 if name != "local-cpu" else 60
    assert budget(container["startupProbe"]) >= 300 + fetched
    assert workload.tree["spec"]["progressDeadlineSeconds"] >= budget(container["startupProbe"])


@pytest.mark.parametrize("name", GPU_OVERLAYS)
def test_the_conductor_waits_for_a_generator_as_long_as_its_probe_does(name: str) -> None:
    """Its alarm calls a person (HonedRunNeedsAPerson), so that it must not come while an engine may still load."""
    [generation] = [w for w in every_workload("Deployment") if (w.overlay, w.component) == (name, "generation")]
    assert run_settings(name).conductor.start_timeout_s >= budget(generation.containers[0]["startupProbe"])


@everyone
def test_the_grace_is_longer_than_the_drain(workload: Workload) -> None:
    grace = workload.pod["terminationGracePeriodSeconds"]
    if workload.component not in SERVICES:
        assert grace >= 30
        return
    section: ServerSettings = getattr(run_settings(workload.overlay), workload.component)
    linger_s = LINGER_S if section.linger_s is None else section.linger_s
    # As `honed.conductor.processes`: calls in flight have drain_s, and so does the work behind them.
    assert grace >= linger_s + max(STOP_S, 2 * section.drain_s + 10)


@serving
def test_a_disruption_budget_that_lets_a_node_be_drained(workload: Workload) -> None:
    budgets = of_kind(overlay(workload.overlay), "PodDisruptionBudget")
    [found] = [b for b in budgets if selects(b["spec"]["selector"], workload.labels)]
    assert found["spec"]["maxUnavailable"] == 1
    assert "minAvailable" not in found["spec"]


@serving
def test_replicas_spread_over_nodes(workload: Workload) -> None:
    if workload.component not in {"generation", "reward", "preference"}:
        assert workload.tree["spec"]["replicas"] == 1
        return
    constraints = workload.pod["topologySpreadConstraints"]
    assert "kubernetes.io/hostname" in {c["topologyKey"] for c in constraints}
    assert all(selects(c["labelSelector"], workload.labels) for c in constraints)


@serving
def test_its_selector_is_its_own(workload: Workload) -> None:
    selector = workload.tree["spec"]["selector"]
    matching = [w for w in every_workload() if w.overlay == workload.overlay and selects(selector, w.labels)]
    assert [w.name for w in matching] == [workload.name]
    assert workload.tree["metadata"]["labels"][COMPONENT] == workload.component


@serving
def test_a_gpu_is_given_back_before_it_is_asked_for(workload: Workload) -> None:
    held = any("nvidia.com/gpu" in c["resources"]["limits"] for c in workload.containers)
    assert held is (workload.overlay != "local-cpu" and workload.component in {"generation", "learner"})
    if held and workload.kind == "Deployment":
        assert workload.tree["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


@serving
def test_a_volume_of_one_writer_is_never_mounted_twice(workload: Workload) -> None:
    claims = [v["persistentVolumeClaim"]["claimName"] for v in workload.pod["volumes"] if "persistentVolumeClaim" in v]
    own = [claim for claim in claims if claim != "honed-store"]
    if own and workload.kind == "Deployment":
        assert workload.tree["spec"]["strategy"] == {"type": "Recreate"}
        assert workload.tree["spec"]["replicas"] == 1
    for claim in claims:
        named(overlay(workload.overlay), "PersistentVolumeClaim", claim)


@pytest.mark.parametrize("workload", every_workload(*ENDING), ids=str)
def test_jobs_end(workload: Workload) -> None:
    spec = workload.tree["spec"]["jobTemplate"]["spec"] if workload.kind == "CronJob" else workload.tree["spec"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert math.isfinite(spec["activeDeadlineSeconds"])
    assert "backoffLimit" in spec


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_jobs_of_the_conductor_are_templates_that_know_its_exit_codes(name: str) -> None:
    for job in ("pretrain", "reward-model"):
        tree = named(overlay(name), "CronJob", f"honed-{job}")
        spec = tree["spec"]["jobTemplate"]["spec"]
        assert tree["spec"]["suspend"] is True
        assert tree["metadata"]["labels"]["honed.dev/job"] == job
        assert spec["template"]["metadata"]["labels"]["honed.dev/job"] == job
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
        ignore, count, fail = spec["podFailurePolicy"]["rules"]
        assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
        assert (count["action"], count["onExitCodes"]["operator"], count["onExitCodes"]["values"]) == (
            "Count",
            "In",
            [os.EX_TEMPFAIL, *KILLED],
        )
        assert (fail["action"], fail["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
        assert fail["onExitCodes"]["values"] == count["onExitCodes"]["values"]
        [container] = spec["template"]["spec"]["containers"]
        assert container["command"] == ["honed", "job", job]
        assert {r["onExitCodes"]["containerName"] for r in (count, fail)} == {container["name"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_training_waits_for_a_job_and_a_job_may_take_its_room(name: str) -> None:
    value = {t["metadata"]["name"]: t["value"] for t in of_kind(overlay(name), "PriorityClass")}
    assert value["honed-core"] > value["honed-serving"] > value["honed-job"] > value["honed-training"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_namespace_enforces_what_the_pods_keep(name: str) -> None:
    labels = named(overlay(name), "Namespace", NAMESPACE)["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {"restricted"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_everything_is_in_the_namespace(name: str) -> None:
    free = {"Namespace", "PersistentVolume", "PriorityClass"}
    for tree in overlay(name):
        assert (tree["metadata"].get("namespace") == NAMESPACE) is (tree["kind"] not in free), tree["metadata"]["name"]
        for subject in tree.get("subjects", []):
            assert subject["namespace"] == NAMESPACE


def test_one_node_of_two_cores_has_room_for_everything_at_once() -> None:
    """With the system's own pods (about 0.2 cores) beside it, and a job while everything else runs."""
    cpu = memory = 0.0
    for workload in every_workload():
        if workload.overlay != "local-cpu" or workload.name == "honed-reward-model":  # one job at a time
            continue
        for key in ("cpu", "memory"):
            of = [quantity(c["resources"]["requests"][key]) for c in workload.containers]
            before = [quantity(c["resources"]["requests"][key]) for c in workload.pod.get("initContainers", [])]
            needed = max([sum(of), *before]) * workload.tree["spec"].get("replicas", 1)
            cpu, memory = (cpu + needed, memory) if key == "cpu" else (cpu, memory + needed)
    assert cpu <= 1.8
    assert memory <= 7 * 2**30
