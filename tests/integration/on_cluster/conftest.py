"""A run on a cluster: Pods that lead to real services of this machine, through a stand-in for the API server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.integration.client import served
from tests.support.kubernetes import KubernetesApi, kubernetes_api, pod
from typer.testing import CliRunner

from honed.cli.main import app
from honed.cluster.api import Cluster
from honed.cluster.run import ClusterRun

GRPC, REDIS, METRICS = 50051, 6379, 9090


@dataclass
class Place:
    """A namespace with services.

    Attributes:
        generations: the service behind each generation Pod.
    """

    api: KubernetesApi
    kubeconfig: Path
    loop: served.Loop
    tokens: Path
    generations: dict[str, served.Generation] = field(default_factory=dict)

    def run(self) -> ClusterRun:
        return ClusterRun(Cluster.of("", {"KUBECONFIG": str(self.kubeconfig)}), {})

    def serve(self, name: str, component: str, servicer: Any) -> None:
        """A Pod with a real service."""
        host, _, port = self.loop.serve(servicer, self.tokens).rpartition(":")
        self.api.put("pods", name, pod(component))
        self.api.backends[name, GRPC] = (host, int(port))

    def generator(self, name: str) -> served.Generation:
        """A generation Pod."""
        self.generations[name] = served.Generation()
        self.serve(name, "generation", self.generations[name].servicer())
        return self.generations[name]

    def honed(self, *arguments: str, stdin: str | None = None, **environment: str) -> Any:
        """Runs a command against the cluster."""
        inherited = {"KUBECONFIG": str(self.kubeconfig), "HONED_TOKEN": "", "HONED_CLUSTER": "", "HOME": os.environ["HOME"]}
        return CliRunner().invoke(app, ["--cluster", *arguments], input=stdin, env={**inherited, **environment})


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    loop = served.Loop()
    try:
        with kubernetes_api(tmp_path) as (api, kubeconfig):
            tokens = served.make_tokens(tmp_path)
            for name in ("operator", "application"):
                api.secret(f"honed-token-{name}", **{f"{name}_token": (tokens / f"{name}.token").read_text()})
            api.put(
                "configmaps", "honed-run-5f7c", {"data": {"run.yaml": "run: demo\nqueue: {url: redis://honed-redis:6379/0}\n"}}
            )
            yield Place(api, kubeconfig, loop, tokens)
    finally:
        loop.close()
