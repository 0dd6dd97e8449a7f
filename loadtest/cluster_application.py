"""An application inside of a cluster: a namespace of its own, which the run's policies let in, with one Pod that asks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtest.kubectl import Kubectl, until

NAMESPACE = "honed-application"
NAME = "application"
SCRIPT = Path(__file__).with_name("applications_pod.py")
END_TIMEOUT_S = 120.0


@contextmanager
def application(kubectl: Kubectl) -> Iterator[str]:
    """Lets an application ask as long as the block runs; yields the name of its Pod.

    Raises:
        RuntimeError: kubectl failed.
        TimeoutError: it does not get an answer.
    """
    token = kubectl.json("get", "secret", "honed-token-application")["data"]
    image = kubectl("get", "deployment", "honed-conductor", "-o", "jsonpath={.spec.template.spec.containers[0].image}")
    inside = Kubectl(kubectl.program, kubectl.context, NAMESPACE)
    try:
        inside.apply(*_objects(token, image, f"dns:///honed-generation.{kubectl.namespace}.svc:50051"))
        until(lambda: _last(inside)["answered"] > 0, 120, "the application has an answer")
        yield NAME
    finally:
        inside("delete", "namespace", NAMESPACE, "--ignore-not-found", timeout_s=180)


def figures_of(kubectl: Kubectl, pod: str) -> dict[str, Any]:
    """Lets the application end, and returns what it counted.

    Raises:
        RuntimeError: kubectl failed.
        TimeoutError: it does not end.
    """
    inside = Kubectl(kubectl.program, kubectl.context, NAMESPACE)
    inside("exec", pod, "--", "python3", "-c", "import os, signal; os.kill(1, signal.SIGTERM)")
    ended = ("Succeeded", "Failed")
    until(lambda: inside("get", "pod", pod, "-o", "jsonpath={.status.phase}") in ended, END_TIMEOUT_S, "the application ends")
    return _last(inside)


def _last(inside: Kubectl) -> dict[str, Any]:
    """The newest figures that it has told; a library may have written a line after them."""
    for line in reversed(inside("logs", NAME, "--tail=20").splitlines()):
        with contextlib.suppress(ValueError):
            if isinstance(figures := json.loads(line), dict):
                return figures
    return {"answered": 0}


def _objects(token: dict[str, str], image: str, target: str) -> list[dict[str, Any]]:
    enforce = "pod-security.kubernetes.io/enforce"
    return [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {"honed.dev/client": "true", enforce: "restricted"}},
        },
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "token", "namespace": NAMESPACE}, "data": token},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "script", "namespace": NAMESPACE},
            "data": {"application.py": SCRIPT.read_text()},
        },
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": NAME, "namespace": NAMESPACE},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 90,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 65532,
                    "runAsGroup": 65532,
                    "fsGroup": 65532,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": NAME,
                        "image": image,
                        "imagePullPolicy": "IfNotPresent",
                        "command": ["python3", "/script/application.py", target, "/token/application.token"],
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "readOnlyRootFilesystem": True,
                            "capabilities": {"drop": ["ALL"]},
                        },
                        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
                        "volumeMounts": [
                            {"name": "script", "mountPath": "/script", "readOnly": True},
                            {"name": "token", "mountPath": "/token", "readOnly": True},
                        ],
                    }
                ],
                "volumes": [
                    {"name": "script", "configMap": {"name": "script"}},
                    {"name": "token", "secret": {"secretName": "token", "defaultMode": 0o440}},
                ],
            },
        },
    ]
