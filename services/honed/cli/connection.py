"""How a command finds the service that it talks to: by address, by the run that is up, or in a cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from honed._client.peer import Peer
    from honed.cluster.run import ClusterRun

RunOption = Annotated[
    Path | None,
    typer.Option("--run", help="Directory of the run. Unset: $HONED_RUN_DIR, else the newest run that is up under ./out."),
]
AddressOption = Annotated[str | None, typer.Option("--address", help="host:port of the service, in place of a run.")]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", help="Bearer token for --address. Unset: $HONED_TOKEN, else the run's own.")
]

_asked: ContextVar[str | None] = ContextVar("honed_cluster", default=None)
_explicit: ContextVar[bool] = ContextVar("honed_cluster_explicit", default=False)
_opened: ContextVar[ClusterRun | None] = ContextVar("honed_cluster_run", default=None)


def ask_cluster(asked: str | None, *, explicit: bool = True) -> None:
    """Lets the commands of this process talk to a run on a cluster.

    Args:
        asked: CONTEXT/NAMESPACE, or parts of it; None for no cluster.
        explicit: whether the command line says so; otherwise $HONED_CLUSTER does, before which other options come.
    """
    _asked.set(asked)
    _explicit.set(explicit)
    _opened.set(None)


def asked_cluster() -> str | None:
    """What `--cluster` says; None without it."""
    return _asked.get()


def check_no_cluster(command: str) -> None:
    """Asserts that the command line names no cluster to a command that talks to none.

    Raises:
        BadParameter: it does.
    """
    if _asked.get() is not None and _explicit.get():
        raise typer.BadParameter(
            f"`honed {command}` works on this machine alone and talks to no cluster", param_hint="--cluster"
        )


def find_cluster(run: Path | None = None, address: str | None = None) -> ClusterRun | None:
    """The run on a cluster that a command talks to; None where it talks to another.

    Args:
        run: what `--run` says: it comes before $HONED_CLUSTER.
        address: what `--address` says, in the same way.

    Raises:
        ValueError: both are on the command line.
        HonedError: the cluster that is asked for cannot be found.
    """
    asked, elsewhere = _asked.get(), run is not None or address is not None
    if asked is not None and elsewhere and _explicit.get():
        raise ValueError("--cluster names one run, and --run or --address another: give one of them")
    if asked is None or elsewhere:
        return None
    found = _opened.get()
    if found is None:
        from honed.cluster.api import Cluster
        from honed.cluster.run import ClusterRun

        found = ClusterRun(Cluster.of(asked))
        _opened.set(found)
    return found


def find_run(run: Path | None, environment: Mapping[str, str] = os.environ) -> Path:
    """The directory of the run to talk to.

    Raises:
        ValueError: there is none.
    """
    if run is not None:
        return run
    if named := environment.get("HONED_RUN_DIR"):
        return Path(named)
    found = [(path.stat().st_mtime, path.parent) for path in Path("out").glob("*/endpoints.json")]
    if not found:
        raise ValueError(
            "no run found under ./out: start one by `honed up` or `honed demo --keep`, or name one by --run DIR, --address or "
            "`honed --cluster`"
        )
    return max(found)[1]


def open_peer(
    service: str,
    run: Path | None,
    address: str | None,
    token_file: Path | None,
    environment: Mapping[str, str] = os.environ,
) -> Peer:
    """A connection to one service; nothing is sent to it yet.

    Raises:
        HonedError: a cluster has no Pod of the service that is ready, or does not let the caller in.
        ValueError: no run is up, or a file cannot be read.
    """
    from honed._client.endpoints import Endpoints
    from honed._client.peer import Peer
    from honed.kit.tokens import read_token

    if cluster := find_cluster(run, address):
        return cluster.peer(service, token_file)
    if address is not None:
        token = read_token(token_file) if token_file is not None else environment.get("HONED_TOKEN")
        return Peer(service, address, token)
    endpoints = Endpoints.read(find_run(run, environment))
    token_file = token_file or endpoints.operator_token_file
    token = read_token(token_file) if token_file is not None else environment.get("HONED_TOKEN")
    return Peer(service, endpoints.address(service), token, endpoints.tls)
