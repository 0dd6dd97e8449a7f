"""Names of objects in the namespace of a run, as the manifests under deploy/ have them."""

from __future__ import annotations

from typing import Final

RUN_MAP: Final = "honed-run"
"""The ConfigMap with the run file, key `run.yaml`; kustomize adds a hash to its name."""
RUN_KEY: Final = "run.yaml"
TABLE: Final = "honed-token-table"
"""Secret with the digests of all tokens, key `table.json`: what servers read."""
TABLE_KEY: Final = "table.json"
REDIS: Final = "honed-redis"
DATABASE: Final = "honed-database"
"""Secrets with a password each, key `password`."""
PASSWORD_KEY: Final = "password"  # noqa: S105  # the name of a key
OPERATOR_TLS: Final = "honed-tls-operator"
"""Secret with the certificate of whoever operates the run, where mutual TLS is on."""


def of_token(name: str) -> str:
    """The Secret with one token; its key is `of_token_key`."""
    return f"honed-token-{name}"


def of_token_key(name: str) -> str:
    """The key in that Secret, which is also the name of the file in a Pod."""
    return f"{name}.token"
