"""Bearer tokens: making them, keeping them, checking them.

A directory holds `table.json` (what servers read: name, sha256 and scopes of each token) and one `<name>.token` file for each
token (what a client reads). Servers never hold a token itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from honed.kit.errors import PermissionDenied, Unauthenticated
from honed.kit.scopes import ALL, APPLICATION_SCOPES, SCOPES, allows

LOCAL_TOKENS: Mapping[str, tuple[str, ...]] = {
    "internal": (ALL,),
    "application": APPLICATION_SCOPES,
}
"""What a local run makes for itself: services call each other as `internal`, people start with `application`."""


@dataclass(frozen=True)
class Identity:
    """Who calls: the token's name and what it may do."""

    name: str
    scopes: frozenset[str]


@dataclass(frozen=True)
class TokenTable:
    """The tokens that a server accepts, by sha256."""

    by_digest: Mapping[str, Identity]

    @classmethod
    def load(cls, path: Path) -> TokenTable:
        """Reads a table.

        Raises:
            ValueError: the file is missing or is not a token table; says what to do.
        """
        try:
            rows = json.loads(path.read_text())["tokens"]
            table = {row["sha256"]: Identity(row["name"], frozenset(row["scopes"])) for row in rows}
        except FileNotFoundError as error:
            raise ValueError(f"token table {path} does not exist: `honed up` makes one, or mount your own") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"token table {path} is not {{'tokens': [{{name, sha256, scopes}}]}}: {error}") from error
        return cls(table)

    def authorize(self, authorization: str | None, method: str) -> Identity:
        """Checks the `authorization` metadata of a call.

        Raises:
            Unauthenticated: there is no token, or it is unknown.
            PermissionDenied: the token lacks the scope that `method` needs, or nobody may call `method`.
        """
        needed = SCOPES.get(method)
        if needed is None:
            raise PermissionDenied(f"{method} is not part of the contract")
        if needed == "":
            return Identity("anonymous", frozenset())
        if authorization is None or not authorization.startswith("Bearer "):
            raise Unauthenticated("no bearer token: send metadata `authorization: Bearer <token>`")
        # The lookup compares digests, so its timing tells nothing about a token.
        identity = self.by_digest.get(digest(authorization.removeprefix("Bearer ").strip()))
        if identity is None:
            raise Unauthenticated("this bearer token is unknown to the server: check the token file of this run")
        if not allows(identity.scopes, needed):
            raise PermissionDenied(f"token '{identity.name}' lacks the scope '{needed}' that {method} needs")
        return identity


def digest(token: str) -> str:
    """The sha256 of a token, as the table holds it."""
    return hashlib.sha256(token.encode()).hexdigest()


def ensure_local_tokens(directory: Path) -> None:
    """Makes the tokens of a local run, once; files are readable by their owner only."""
    if (directory / "table.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    rows = []
    for name, scopes in LOCAL_TOKENS.items():
        token = f"honed_{secrets.token_urlsafe(32)}"
        _write_private(directory / f"{name}.token", token + "\n")
        rows.append({"name": name, "sha256": digest(token), "scopes": list(scopes)})
    # The table comes last: with it, the set is complete.
    _write_private(directory / "table.json", json.dumps({"tokens": rows}, indent=2) + "\n")


def read_token(path: Path) -> str:
    """Reads a token file.

    Raises:
        ValueError: the file is missing or empty.
    """
    try:
        token = path.read_text().strip()
    except FileNotFoundError as error:
        raise ValueError(f"token file {path} does not exist: start the run first, or name another file") from error
    if not token:
        raise ValueError(f"token file {path} is empty")
    return token


def _write_private(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    partial.rename(path)
