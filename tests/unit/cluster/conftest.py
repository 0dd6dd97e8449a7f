"""A stand-in for an API server, and the cluster that a kubeconfig finds it by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.kubernetes import KubernetesApi, kubernetes_api

from honed.cluster.api import Cluster


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[KubernetesApi, Path]]:
    with kubernetes_api(tmp_path) as found:
        yield found


@pytest.fixture
def api(served: tuple[KubernetesApi, Path]) -> KubernetesApi:
    return served[0]


@pytest.fixture
def cluster(served: tuple[KubernetesApi, Path]) -> Cluster:
    return Cluster.of("", {"KUBECONFIG": str(served[1])})
