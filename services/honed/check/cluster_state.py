"""Checks a run file against the namespace that it is for: Secrets, volumes, the store, and what the Pods say."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from honed.artifacts.files import open_backend
from honed.check.cluster_files import is_path, is_sqlite
from honed.check.cluster_places import STORE
from honed.check.findings import Report
from honed.cluster import names
from honed.cluster.api import Cluster, items
from honed.cluster.pods import NAME_LABEL, list_pods, trouble_of
from honed.config import RunSettings
from honed.kit.errors import HonedError, PermissionDenied
from honed.topology import SERVICES

_WORKLOADS: Final = (("apps/v1", "deployments"), ("apps/v1", "statefulsets"), ("batch/v1", "cronjobs"))
_OF_STORE: Final = ("generation", "reward", "learner", "conductor")
_STORE_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True)
class Workload:
    """A Deployment, StatefulSet or CronJob of the run.

    Attributes:
        name: its name.
        replicas: that are asked for.
        spec: of its Pods.
        claims: templates of claims that a StatefulSet makes by itself.
    """

    name: str
    replicas: int
    spec: dict[str, Any]
    claims: frozenset[str]

    def secrets(self) -> Iterator[str]:
        """Names of Secrets that its Pods cannot start without."""
        for volume in self.spec.get("volumes") or ():
            for source in (volume, *(volume.get("projected", {}).get("sources") or ())):
                secret = source.get("secret") or {}
                if not secret.get("optional") and (name := secret.get("secretName") or secret.get("name")):
                    yield name
        for container in (*(self.spec.get("initContainers") or ()), *(self.spec.get("containers") or ())):
            references = [entry.get("valueFrom", {}).get("secretKeyRef") for entry in container.get("env") or ()]
            references += [entry.get("secretRef") for entry in container.get("envFrom") or ()]
            yield from (each["name"] for each in references if each and not each.get("optional"))

    def claim_at(self, path: str) -> str:
        """The claim that its first container mounts at a path; empty if none is mounted there."""
        for mount in self.spec["containers"][0].get("volumeMounts") or ():
            if mount["mountPath"].rstrip("/") == path:
                return next((claim for volume, claim in self._claims() if volume == mount["name"]), "")
        return ""

    def _claims(self) -> Iterator[tuple[str, str]]:
        """Volumes with the claims behind them."""
        for volume in self.spec.get("volumes") or ():
            if claim := volume.get("persistentVolumeClaim"):
                yield volume["name"], claim["claimName"]
        for template in self.claims:
            yield template, template

    def named_claims(self) -> set[str]:
        """Claims that must be there before its Pods."""
        return {claim for volume, claim in self._claims() if volume not in self.claims}


def check_state(settings: RunSettings, cluster: Cluster, report: Report) -> None:
    """Finds what the namespace lacks. What the caller must not read is a warning, and left out.

    Raises:
        HonedError: the API server does not answer, or does not know the caller.
    """
    workloads = _read(report, "the workloads", lambda: list(_workloads(cluster))) or []
    if not workloads:
        report.warning("cluster", f"namespace {cluster.name} has no workload of honed yet: its volumes could not be checked")
    wanted = {name for workload in workloads for name in workload.secrets()} or _usual_secrets(settings)
    _read(report, "Secrets", lambda: _check_secrets(cluster, wanted, report))
    _read(report, "volumes", lambda: _check_claims(cluster, workloads, report))
    _check_replicas(settings, workloads, report)
    _check_store(settings, workloads, report)
    _read(report, "Pods", lambda: _check_pods(cluster, report))


def _read(report: Report, what: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except PermissionDenied as error:
        report.warning("cluster", f"{what} could not be checked: {error}")
        return None


def _workloads(cluster: Cluster) -> Iterator[Workload]:
    for group, kind in _WORKLOADS:
        for tree in items(cluster.get(cluster.group(group, kind), labelSelector=f"{NAME_LABEL}=honed")):
            spec = tree["spec"]
            template = spec["jobTemplate"]["spec"]["template"] if kind == "cronjobs" else spec["template"]
            claims = frozenset(claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates") or ())
            yield Workload(tree["metadata"]["name"], spec.get("replicas", 1), template["spec"], claims)


def _usual_secrets(settings: RunSettings) -> set[str]:
    """What the manifests ask for, as long as none are there to ask."""
    found = {names.TABLE, *map(names.of_token, SERVICES)} if settings.security.authentication else set()
    return found | ({names.REDIS} if settings.queue.password_file else set())


def _check_secrets(cluster: Cluster, wanted: Iterable[str], report: Report) -> None:
    for name in sorted(wanted):
        if cluster.find(cluster.core("secrets", name)) is None:
            made = name in {names.TABLE, names.REDIS, names.DATABASE} or name.startswith(names.of_token(""))
            advice = f"`honed --cluster {cluster.name} cluster secrets` makes it" if made else "make it"
            report.error(f"Secret {name}", f"is missing in namespace {cluster.name}, and Pods wait for it: {advice}")


def _check_claims(cluster: Cluster, workloads: Iterable[Workload], report: Report) -> None:
    for name in sorted({claim for workload in workloads for claim in workload.named_claims()}):
        found = cluster.find(cluster.core("persistentvolumeclaims", name))
        where, describe = f"PersistentVolumeClaim {name}", f"`{cluster.kubectl} describe pvc {name}` tells why"
        if found is None:
            report.error(where, f"is missing in namespace {cluster.name}: apply the overlay again")
        elif (phase := found.get("status", {}).get("phase")) == "Lost":
            report.error(where, f"has lost its volume: {describe}")
        elif phase == "Pending":
            report.warning(where, f"has no volume yet; a Pod that needs it waits: {describe}")


def _check_replicas(settings: RunSettings, workloads: Iterable[Workload], report: Report) -> None:
    for workload in workloads:
        if workload.name == "honed-preference" and workload.replicas > 1 and is_sqlite(settings):
            report.error(
                "preference.database_url",
                f"is SQLite, which has one writer, and {workload.name} has {workload.replicas} replicas: set one, or name a "
                "PostgreSQL server",
            )


def _check_store(settings: RunSettings, workloads: Iterable[Workload], report: Report) -> None:
    url = settings.policy_url
    if is_path(url):
        claims = {w.name: w.claim_at(STORE) for w in workloads if w.name.removeprefix("honed-") in _OF_STORE}
        lacking = [name for name, claim in claims.items() if not claim]
        if lacking:
            report.error(
                "policy.url",
                f"is {url}, and no volume is mounted there in {', '.join(lacking)}, so that each Pod would have a store of its "
                "own: add the component store-volume, or name an object store",
            )
        elif len(set(claims.values())) > 1:
            mounts = ", ".join(f"{name}: {claim}" for name, claim in claims.items())
            report.error(
                "policy.url", f"is {url}, where the workloads mount different volumes ({mounts}): mount one in all of them"
            )
        return
    try:
        backend = open_backend(url, _STORE_TIMEOUT_S)
        probe = backend.join(f".honed-check-{uuid.uuid4().hex}")
        backend.write(probe, b"honed check")
        backend.remove(probe)
    except (HonedError, OSError, ImportError, ValueError) as error:
        report.warning("policy.url", f"{url} cannot be written from this machine ({error}); the Pods' own words count")


def _check_pods(cluster: Cluster, report: Report) -> None:
    for pod in list_pods(cluster):
        if not pod.ready and not pod.leaving:
            report.error(f"Pod {pod.name}", f"is not ready: {trouble_of(cluster, pod)}")
