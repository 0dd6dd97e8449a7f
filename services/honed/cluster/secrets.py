"""Makes the Secrets of a run that are missing: its tokens, and the passwords of Redis and of the database.

What is there is never written: it may be somebody's own, or in use. So this may be repeated, and several may do it at once: of
two who make one Secret the API server refuses the second, who goes on with what the first one made. The table of tokens comes
last, made from the tokens that are there by then; all who come so far make the same table.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from honed.cluster import names
from honed.cluster.api import Cluster
from honed.kit.errors import Conflict, FailedPrecondition
from honed.kit.scopes import LOCAL_TOKENS
from honed.kit.tokens import new_token, table_text

_LABELS = {"app.kubernetes.io/name": "honed", "app.kubernetes.io/part-of": "honed"}


@dataclass
class Made:
    """What became of the Secrets, by name."""

    made: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)


def ensure_secrets(cluster: Cluster, new: Callable[[], str] = new_token) -> Made:
    """Makes what is missing.

    Args:
        cluster: where.
        new: makes a token.

    Raises:
        PermissionDenied: the caller lacks `get` or `create` on Secrets.
        FailedPrecondition: a token is gone that the table knows, or a Secret lacks its key.
        Unavailable: the API server does not answer.
    """
    made = Made()
    table = cluster.find(cluster.core("secrets", names.TABLE))
    if table is not None:
        _check_tokens(cluster, made)
    else:
        tokens = {}
        for name in LOCAL_TOKENS:
            key = names.of_token_key(name)
            tokens[name] = _ensure(cluster, made, names.of_token(name), {key: new() + "\n"})[key].strip()
        _ensure(cluster, made, names.TABLE, {names.TABLE_KEY: table_text(tokens)})
    for name in (names.REDIS, names.DATABASE):
        # Letters that need no escape in a URL, which a database's password becomes a part of.
        _ensure(cluster, made, name, {names.PASSWORD_KEY: secrets.token_hex(24)})
    if table is not None:
        made.found.append(names.TABLE)
    return made


def _check_tokens(cluster: Cluster, made: Made) -> None:
    """The table has digests alone: a token that was deleted cannot be made again to fit it."""
    missing: list[str] = []
    for name in LOCAL_TOKENS:
        there = cluster.find(cluster.core("secrets", names.of_token(name))) is not None
        (made.found if there else missing).append(names.of_token(name))
    if missing:
        raise FailedPrecondition(
            f"namespace {cluster.name} lacks {', '.join(missing)} and has {names.TABLE}, so that no service would know a new "
            f"token: bring the old one back, or delete {names.TABLE} and run this again; services read it by themselves"
        )


def _ensure(cluster: Cluster, made: Made, name: str, texts: Mapping[str, str]) -> dict[str, str]:
    """The texts of a Secret: those given, unless it is there already."""
    found = cluster.find(cluster.core("secrets", name))
    if found is None:
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "labels": _LABELS},
            "type": "Opaque",
            "data": {key: base64.b64encode(text.encode()).decode() for key, text in texts.items()},
        }
        try:
            cluster.call("POST", cluster.core("secrets"), secret)
        except Conflict:  # another was faster, or an answer was lost on its way
            found = cluster.get(cluster.core("secrets", name))
        else:
            made.made.append(name)
            return dict(texts)
    made.found.append(name)
    data = found.get("data") or {}
    if lacking := texts.keys() - data.keys():
        raise FailedPrecondition(
            f"Secret {name} in namespace {cluster.name} has no key {', '.join(lacking)}: add it, or delete the Secret and run "
            "this again"
        )
    return {key: base64.b64decode(data[key]).decode() for key in texts}
