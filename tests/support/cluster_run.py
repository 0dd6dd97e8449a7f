"""A conductor's side of the stand-in: a connection as a kubeconfig gives it, and the jobs of a small run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml
from tests.support.cluster import Cluster

from honed.artifacts.store import PolicyStore
from honed.conductor.cluster import jobs, patience
from honed.conductor.cluster.api import Api, connected
from honed.conductor.cluster.jobs import KubernetesJobs
from honed.conductor.results import Results
from honed.conductor.settings import KubernetesSettings
from honed.config import RunSettings

REQUEST_S = 5.0
SOON_S = 0.3
"""Until a call that is never answered is given up."""


def make_quick(monkeypatch: Any) -> None:
    """Pauses and watches as short as tests need them."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(jobs, "WATCH_S", 0.3)
    monkeypatch.setattr(jobs, "SHORTEST_WATCH_S", 0.02)
    monkeypatch.setattr(jobs, "LOOK_EVERY_S", 0.01)


def section(root: Path, cluster: Cluster, **changes: Any) -> KubernetesSettings:
    """Settings that lead to the stand-in."""
    file = root / "kubeconfig"
    file.write_text(yaml.safe_dump(cluster.kubeconfig()))
    return KubernetesSettings(**{"kubeconfig": file, "request_timeout_s": REQUEST_S, **changes})


@asynccontextmanager
async def api_of(root: Path, cluster: Cluster, **changes: Any) -> AsyncIterator[Api]:
    """A connection of one process."""
    async with connected(section(root, cluster, **changes)) as api:
        yield api


def settings_of(root: Path, start_timeout_s: float = 60.0) -> RunSettings:
    """A run whose policy store is `root`."""
    conductor = {"launcher": "kubernetes", "start_timeout_s": start_timeout_s}
    return RunSettings.model_validate({"run": "small", "policy": {"url": str(root / "policy")}, "conductor": conductor})


def jobs_of(root: Path, api: Api, **changes: Any) -> KubernetesJobs:
    """The jobs of that run."""
    settings = settings_of(root, **changes)
    return KubernetesJobs(api, settings, Results(settings, PolicyStore(settings.policy_url, settings.run)))


def publish_base(root: Path) -> None:
    """What the pretraining job leaves behind."""
    version = root / "policy" / "small" / "0.0"
    version.mkdir(parents=True, exist_ok=True)
    (version / "manifest.json").write_text("{}")
