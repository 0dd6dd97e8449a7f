"""Who opens a connection to whom. The model of the NetworkPolicies is compared with this table (`test_network`), and the table
with what the processes of a local run have really opened (`tests/integration/conductor/test_own_run.py`).

`recorded` reads the latter from what `honed.kit.connections` has written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, order=True)
class Connection:
    """One component opens connections to a port of another."""

    source: str
    target: str
    port: int

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}:{self.port}"


GRPC: Final = 50051
CONTROL: Final = 50052
METRICS: Final = 9090
OTLP: Final = 4317
MLFLOW: Final = 5000
REDIS: Final = 6379
POSTGRES: Final = 5432
S3: Final = 9000
HTTPS: Final = 443
API: Final = 6443
DNS: Final = 53
HEALTH: Final = 8081

_JOBS: Final = ("pretrain", "reward-model")
_SERVED: Final = {"honed.v1.GenerationControlService": CONTROL, "health": HEALTH}
"""The port in a cluster of what a listener serves; everything else is on `GRPC`."""


def recorded(lines: Iterable[str], others: Mapping[int, tuple[str, int]]) -> frozenset[Connection]:
    """The connections that the processes of a run on one machine have opened, by component and with a cluster's ports.

    Args:
        lines: What they have recorded.
        others: Who listens on a port and is no process of honed, and on which port it does in a cluster.

    Returns:
        A port on which nobody listened stands there by its address.
    """
    rows = [json.loads(line) for line in lines]
    listeners = dict(others)
    for row in rows:
        if "listener" in row:
            listeners[row["port"]] = row["listener"], _SERVED.get(row["serves"], GRPC)
    return frozenset(
        Connection(_component(row["from"]), *listeners.get(row["port"], (row["to"], row["port"])))
        for row in rows
        if "from" in row
    )


def _component(process: str) -> str:
    return "job" if process in _JOBS else process


STORE_USERS: Final = ("generation", "reward", "learner", "conductor", "job")

OWN: Final = frozenset(
    Connection(*row)
    for row in (
        ("generation", "redis", REDIS),  # prompts in, rollouts out, registration
        ("generation", "reward", GRPC),  # candidates of a request with best_of
        ("reward", "redis", REDIS),  # rollouts in, scores out, registration
        ("learner", "redis", REDIS),  # scored rollouts, lease, progress
        ("learner", "generation", CONTROL),  # pushes of versions
        ("learner", "preference", GRPC),  # judgements, for an algorithm that learns from them
        ("job", "preference", GRPC),  # the snapshot that a reward model learns from
        ("job", "generation", GRPC),  # samples of the reference policy
        ("conductor", "redis", REDIS),  # prompts, lease, who is registered
        ("conductor", "preference", GRPC),  # import of judgements
        ("conductor", "generation", GRPC),  # evaluation
        ("conductor", "reward", GRPC),  # evaluation, promotions
        ("conductor", "learner", GRPC),  # its status, roll-backs
        ("conductor", "api-server", HTTPS),
        ("conductor", "api-server", API),
    )
)
"""What each run opens, whatever its overlay."""

NOT_ON_ONE_MACHINE: Final = {
    Connection("generation", "reward", GRPC): "no application of the recorded run asks for best-of-n",
    Connection("learner", "preference", GRPC): "the recorded run learns from rollouts, not from judgements",
    Connection("conductor", "api-server", HTTPS): "a run on one machine has no Kubernetes",
    Connection("conductor", "api-server", API): "a run on one machine has no Kubernetes",
}
"""What of it a run on one machine does not open, and why; `OF_OVERLAY` adds databases, stores and operators, which it lacks."""

ONLY_ON_ONE_MACHINE: Final = {
    Connection("conductor", "conductor", GRPC): "`honed up` shows the run that it drives, by its own service",
}
"""What a run on one machine opens and a cluster does not, and why."""

_SECRETS: Final = frozenset({Connection("secrets", "api-server", HTTPS), Connection("secrets", "api-server", API)})
_DATABASE: Final = frozenset(Connection(source, "postgres", POSTGRES) for source in ("preference", "migrate"))
_BACKUP: Final = frozenset({Connection("backup", "postgres", POSTGRES), Connection("backup", "internet", HTTPS)})

OF_OVERLAY: Final = {
    "local-cpu": OWN | _SECRETS,
    "gpu": OWN | _SECRETS | _DATABASE | frozenset(Connection(source, "minio", S3) for source in (*STORE_USERS, "bucket")),
    "production": OWN
    | _DATABASE
    | _BACKUP
    | frozenset(Connection(source, "internet", HTTPS) for source in STORE_USERS)
    | frozenset(Connection("gateway", target, GRPC) for target in ("generation", "reward"))
    | frozenset({Connection("keda", "redis", REDIS), Connection("conductor", "mlflow", MLFLOW)})
    | frozenset(
        Connection("monitoring", target, METRICS) for target in ("generation", "reward", "preference", "learner", "conductor")
    )
    | frozenset(
        Connection(source, "monitoring", OTLP)
        for source in ("generation", "reward", "preference", "learner", "conductor", "job")
    ),
}
"""What an overlay's own parts open beside that."""

CLIENTS: Final = frozenset(Connection("client", target, GRPC) for target in ("generation", "reward", "preference"))
"""Applications in namespaces that are labelled for it."""
