"""`honed versions`: the policy versions that the run's store holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from honed.cli import output
from honed.cli.connection import AddressOption, RunOption, TokenFileOption, open_peer

if TYPE_CHECKING:
    from honed._client.peer import Peer
    from honed.v1 import conductor_pb2

_PAGE = 100
_TIMEOUT_S = 30.0


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: honed versions --limit 5")(versions)


def versions(
    limit: Annotated[int, typer.Option(min=0, help="The newest so many; 0 for all.")] = 20,
    json: output.JsonOption = False,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """List the policy versions, newest first: what each was trained from, and the digest of its manifest."""
    with open_peer("conductor", run, address, token_file) as peer:
        found = [_row(info) for info in _listed(peer, limit)]
    if json:
        for row in found:
            output.show_json(row)
        return
    rows = [
        [
            row["version"],
            row["parent"] or "-",
            row["created_at"],
            f"{row['bytes'] / 1e6:.1f}",
            row["manifest_sha256"][:12],
            row["reward_model_version"][:12] or "-",
        ]
        for row in found
    ]
    output.show(output.table(["version", "parent", "created", "MB", "digest", "reward model"], rows, numbers=["MB"]))


def _listed(peer: Peer, limit: int) -> Iterator[conductor_pb2.VersionInfo]:
    from honed.v1 import common_pb2, conductor_pb2, conductor_pb2_grpc

    stub = conductor_pb2_grpc.ConductorServiceStub(peer.channel)
    token, left = "", limit
    while True:
        page = common_pb2.PageRequest(page_size=min(left, _PAGE) if limit else _PAGE, page_token=token)
        answer = peer.unary(stub.ListVersions, conductor_pb2.ListVersionsRequest(page=page), _TIMEOUT_S)
        yield from answer.versions
        token, left = answer.next_page_token, left - len(answer.versions)
        if not token or (limit and left <= 0):
            return


def _row(info: conductor_pb2.VersionInfo) -> dict[str, Any]:
    lineage = info.lineage
    return {
        "version": f"{info.version.fence}.{info.version.step}",
        "run": info.version.run,
        "parent": lineage.parent,
        "created_at": lineage.created_at.ToJsonString() if lineage.HasField("created_at") else "",
        "bytes": info.bytes,
        "manifest_sha256": info.manifest_sha256,
        "config_hash": lineage.config_hash,
        "reward_model_version": lineage.reward_model_version,
        "preference_snapshot": lineage.preference_snapshot,
    }
