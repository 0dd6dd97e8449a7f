"""Who opens a connection to whom, as the code does it. The model of the NetworkPolicies is compared with this table.

`recorded` reads the same facts as lines of JSON, one a connection (`{"from": "learner", "to": "generation", "port": 50052}`):
what a local run has really opened can so be held against the table, and the table against the policies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
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


def recorded(lines: Iterable[str]) -> frozenset[Connection]:
    """The connections that a run has recorded."""
    rows = (json.loads(line) for line in lines)
    return frozenset(Connection(row["from"], row["to"], int(row["port"])) for row in rows)


GRPC: Final = 50051
CONTROL: Final = 50052
METRICS: Final = 9090
OTLP: Final = 4317
REDIS: Final = 6379
POSTGRES: Final = 5432
S3: Final = 9000
HTTPS: Final = 443
API: Final = 6443
DNS: Final = 53

STORE_USERS: Final = ("generation", "reward", "learner", "conductor", "job")

OWN: Final = frozenset(
    Connection(*row)
    for row in (
        ("generation", "redis", REDIS),  # prompts in, rollouts out, registration
        ("reward", "redis", REDIS),  # rollouts in, scores out, registration
        ("learner", "redis", REDIS),  # scored rollouts, lease, progress
        ("learner", "generation", CONTROL),  # pushes of versions
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
    | frozenset({Connection("keda", "redis", REDIS)})
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
