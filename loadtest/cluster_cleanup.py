"""Removes from a cluster what a trial made there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtest.kubectl import Kubectl, until


@contextmanager
def cleaned_up(kubectl: Kubectl, overlay: Path, *, keep: bool) -> Iterator[None]:
    """Deletes what the block made: its objects, and the files in its volumes."""
    try:
        yield
    finally:
        if not keep:
            try:
                empty_volumes(kubectl)
            except (RuntimeError, TimeoutError) as error:  # the objects go whatever becomes of the files
                print(f"the files in the run's volumes may be left: {error}", file=sys.stderr)
            kubectl("delete", "--ignore-not-found", "-k", str(overlay), timeout_s=300)


def empty_volumes(kubectl: Kubectl) -> None:
    """Stops all that writes, and removes the files of the run: static volumes keep them otherwise.

    Raises:
        RuntimeError: kubectl failed.
        TimeoutError: the files were not removed in time.
    """
    # Of the overlay's own registry and tag: nothing else is known to be on the nodes.
    image = kubectl("get", "statefulset", "honed-redis", "-o", "jsonpath={.spec.template.spec.containers[0].image}")
    kubectl("delete", "--ignore-not-found", "deployments,statefulsets,jobs,cronjobs", "--all", timeout_s=180)
    until(lambda: not kubectl.json("get", "pods")["items"], 180, "the pods end")
    claims = [item["metadata"]["name"] for item in kubectl.json("get", "pvc")["items"]]
    restricted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "honed-empty-volumes"},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "runAsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "empty",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["/bin/sh", "-c", f"rm -rf /volumes/*/honed/{kubectl.namespace}"],
                    "securityContext": restricted,
                    "volumeMounts": [{"name": name, "mountPath": f"/volumes/{name}"} for name in claims],
                }
            ],
            "volumes": [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in claims],
        },
    }
    kubectl.apply(pod)
    until(
        lambda: kubectl("get", "pod", "honed-empty-volumes", "-o", "jsonpath={.status.phase}") in ("Succeeded", "Failed"),
        120,
        "the files of the run are removed",
    )
