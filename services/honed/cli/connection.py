"""How a command finds the service that it talks to: by address, or by the run that is up."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from honed._client.peer import Peer

RunOption = Annotated[
    Path | None,
    typer.Option("--run", help="Directory of the run. Unset: $HONED_RUN_DIR, else the newest run that is up under ./out."),
]
AddressOption = Annotated[str | None, typer.Option("--address", help="host:port of the service, in place of a run.")]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", help="Bearer token for --address. Unset: $HONED_TOKEN, else the run's own.")
]


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
            "no run found under ./out: start one by `honed up` or `honed demo --keep`, or name one by --run DIR or --address"
        )
    return max(found)[1]


def open_peer(
    service: str,
    run: Path | None,
    address: str | None,
    token_file: Path | None,
    environment: Mapping[str, str] = os.environ,
) -> Peer:
    """A connection to one service; nothing is sent yet.

    Raises:
        ValueError: no run is up, or a file cannot be read.
    """
    from honed._client.endpoints import Endpoints
    from honed._client.peer import Peer
    from honed.kit.tokens import read_token

    if address is not None:
        token = read_token(token_file) if token_file is not None else environment.get("HONED_TOKEN")
        return Peer(service, address, token)
    endpoints = Endpoints.read(find_run(run, environment))
    token_file = token_file or endpoints.operator_token_file
    token = read_token(token_file) if token_file is not None else environment.get("HONED_TOKEN")
    return Peer(service, endpoints.address(service), token, endpoints.tls)
