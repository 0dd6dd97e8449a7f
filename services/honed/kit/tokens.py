"""Bearer tokens: making them, keeping them, checking them.

A directory holds `table.json` (what servers read: name, sha256 and scopes of each token) and one `<name>.token` file for each
token (what a client reads). Servers never hold a token itself. Both kinds of files are read again when they are replaced: a
token is revoked by taking its row out of the table, and rotated by adding a row, replacing the file, and taking the old row
out.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from honed.kit.errors import PermissionDenied, Unauthenticated
from honed.kit.from_files import FromFiles
from honed.kit.scopes import LOCAL_TOKENS, SCOPES, allows


@dataclass(frozen=True)
class Identity:
    """Who calls: the token's name and what it may do."""

    name: str
    scopes: frozenset[str]


class TokenTable:
    """The tokens that a server accepts, by sha256."""

    def __init__(self, by_digest: Callable[[], Mapping[str, Identity]]) -> None:
        """`by_digest` returns the rows that hold now."""
        self._by_digest = by_digest

    @classmethod
    def load(cls, path: Path) -> TokenTable:
        """Reads a table, and reads it again whenever the file is replaced.

        Raises:
            ValueError: the file is missing or is not a token table; says what to do.
        """
        return cls(FromFiles([path], lambda: _read_table(path)).get)

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
        identity = self._by_digest().get(digest(authorization.removeprefix("Bearer ").strip()))
        if identity is None:
            raise Unauthenticated("this bearer token is unknown to the server: check the token file of this run")
        if not allows(identity.scopes, needed):
            raise PermissionDenied(f"token '{identity.name}' lacks the scope '{needed}' that {method} needs", identity.name)
        return identity


def digest(token: str) -> str:
    """The sha256 of a token, as the table holds it."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_token() -> str:
    """A token that nobody can guess."""
    return f"honed_{secrets.token_urlsafe(32)}"


def table_text(tokens: Mapping[str, str]) -> str:
    """A token table of tokens by name, each with the scopes that its name has in a run."""
    rows = [{"name": name, "sha256": digest(token), "scopes": list(LOCAL_TOKENS[name])} for name, token in tokens.items()]
    return json.dumps({"tokens": rows}, indent=2) + "\n"


def ensure_local_tokens(directory: Path) -> None:
    """Makes the tokens of a local run, once, however many processes ask; files are readable by their owner only."""
    import fcntl  # only where runs are started: clients import this module on every system

    table = directory / "table.json"
    if table.exists():
        return
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    # The kernel lets go of the lock when its process dies. Who comes second finds the first one's set.
    with os.fdopen(os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if table.exists():
            return
        tokens = {name: new_token() for name in LOCAL_TOKENS}
        for name, token in tokens.items():
            _write_private(directory / f"{name}.token", token + "\n")
        # The table comes last: with it, the set is complete.
        _write_private(table, table_text(tokens))


def local_token_file(directory: Path, name: str) -> Path:
    """The token file of a service, or of the operator. A directory of an earlier build has one `internal` token for all."""
    own, shared = directory / f"{name}.token", directory / "internal.token"
    return shared if shared.exists() and not own.exists() else own


def read_token(path: Path) -> str:
    """Reads a token file.

    Raises:
        ValueError: the file is missing or empty.
    """
    try:
        token = path.read_text().strip()
    except FileNotFoundError as error:
        raise ValueError(f"token file {path} does not exist: start the run first, or name another file") from error
    except OSError as error:
        raise ValueError(f"token file {path} cannot be read: {error.strerror}") from error
    if not token:
        raise ValueError(f"token file {path} is empty")
    return token


def token_source(path: Path) -> Callable[[], str]:
    """What returns the token of a file as it is now, for `connect`.

    Raises:
        ValueError: the file is missing or empty.
    """
    return FromFiles([path], lambda: read_token(path)).get


def _read_table(path: Path) -> dict[str, Identity]:
    try:
        rows = json.loads(path.read_text())["tokens"]
        return {row["sha256"]: Identity(row["name"], frozenset(row["scopes"])) for row in rows}
    except FileNotFoundError as error:
        raise ValueError(
            f"token table {path} does not exist: `honed tokens {path.parent}` makes one, on a cluster `honed cluster secrets`"
        ) from error
    except OSError as error:
        raise ValueError(f"token table {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"token table {path} is not {{'tokens': [{{name, sha256, scopes}}]}}: {error}") from error


def _write_private(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    partial.rename(path)
