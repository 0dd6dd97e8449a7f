"""What the tests of the manifests share: overlays as kustomize renders them, and the workloads in them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import yaml

from honed.config import RunSettings

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
OVERLAYS: Final = ("local-cpu", "gpu", "production")
NAMESPACE: Final = "honed"
CUSTOM: Final = ("keda.sh", "cert-manager.io", "monitoring.coreos.com", "gateway.networking.k8s.io")
"""API groups that a plain cluster lacks; only components may use them."""
COMPONENT: Final = "app.kubernetes.io/component"
SERVING: Final = ("Deployment", "StatefulSet")
ENDING: Final = ("Job", "CronJob")

LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Tree = dict[str, Any]


def kubectl() -> str:
    """The kubectl of the environment, else the machine's own."""
    own = Path(sys.executable).with_name("kubectl")
    found = str(own) if own.exists() else shutil.which("kubectl")
    if found is None:
        raise RuntimeError("there is no kubectl: `make test` installs one (requirements/cpu.lock)")
    return found


@cache
def render(folder: Path) -> list[Tree]:
    """The objects of a kustomization. They are shared: nobody changes them."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [tree for tree in yaml.load_all(done.stdout, LOADER) if tree]


def overlay(name: str) -> list[Tree]:
    """The objects of an overlay."""
    return render(DEPLOY / "overlays" / name)


def of_kind(trees: list[Tree], *kinds: str) -> list[Tree]:
    """Those of the kinds."""
    return [tree for tree in trees if tree["kind"] in kinds]


def named(trees: list[Tree], kind: str, name: str) -> Tree:
    """The one of a kind and a name."""
    [found] = [tree for tree in of_kind(trees, kind) if tree["metadata"]["name"] == name]
    return found


@dataclass(frozen=True)
class Workload:
    """What makes Pods, in one overlay."""

    overlay: str
    tree: Tree

    def __str__(self) -> str:
        return f"{self.overlay}-{self.kind}-{self.name}"

    @property
    def kind(self) -> str:
        return str(self.tree["kind"])

    @property
    def name(self) -> str:
        return str(self.tree["metadata"]["name"])

    @property
    def component(self) -> str:
        return str(self.labels[COMPONENT])

    @cached_property
    def template(self) -> Tree:
        spec = self.tree["spec"]
        found: Tree = (spec["jobTemplate"]["spec"] if self.kind == "CronJob" else spec)["template"]
        return found

    @property
    def labels(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self.template["metadata"]["labels"]
        return found

    @property
    def pod(self) -> Tree:
        found: Tree = self.template["spec"]
        return found

    @property
    def containers(self) -> list[Tree]:
        """The main ones."""
        return list(self.pod["containers"])

    @property
    def every_container(self) -> list[Tree]:
        return [*self.pod.get("initContainers", []), *self.containers]

    def volume(self, name: str) -> Tree:
        [found] = [volume for volume in self.pod["volumes"] if volume["name"] == name]
        return dict(found)

    def secrets(self) -> Iterator[tuple[str, str]]:
        """Each Secret and key of it that the pod sees as a file; all keys are `*`."""
        for volume in self.pod.get("volumes", []):
            sources = [volume, *volume.get("projected", {}).get("sources", [])]
            for secret in (source["secret"] for source in sources if "secret" in source):
                name = secret.get("secretName") or secret.get("name")
                for key in [item["key"] for item in secret.get("items", [])] or ["*"]:
                    yield name, key


def workloads(name: str) -> list[Workload]:
    """Those of an overlay."""
    return [Workload(name, tree) for tree in of_kind(overlay(name), *SERVING, *ENDING)]


def every_workload(*kinds: str) -> list[Workload]:
    """Those of all overlays, of the kinds if any are given."""
    return [found for name in OVERLAYS for found in workloads(name) if not kinds or found.kind in kinds]


def run_tree(name: str) -> Tree:
    """The run file of an overlay."""
    [found] = [t for t in of_kind(overlay(name), "ConfigMap") if t["metadata"]["name"].startswith("honed-run-")]
    tree: Tree = yaml.safe_load(found["data"]["run.yaml"])
    return tree


def run_settings(name: str) -> RunSettings:
    """The same, as the services read it."""
    return RunSettings.model_validate(run_tree(name))


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches everything."""
    selector = selector or {}
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for row in selector.get("matchExpressions") or []:
        held = labels.get(row["key"])
        match row["operator"]:
            case "In":
                good = held in row["values"]
            case "NotIn":
                good = held not in row["values"]
            case "Exists":
                good = held is not None
            case "DoesNotExist":
                good = held is None
            case other:
                raise AssertionError(f"no operator {other}")
        if not good:
            return False
    return True
