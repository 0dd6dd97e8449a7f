"""`honed scale`: more or fewer processes of a service, while the run is up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

from honed.cli import output
from honed.cli.connection import AddressOption, RunOption, TokenFileOption, find_cluster, open_peer


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: honed scale generation=3 reward=2")(scale)


def scale(
    services: Annotated[list[str], typer.Argument(help="SERVICE=NUMBER, of generation and reward.", metavar="SERVICE=NUMBER")],
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait at most.")] = 300.0,
    json: output.JsonOption = False,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Start or end processes of a service. Newcomers serve when this returns; those that go finish what is in flight.

    On a cluster it sets the replicas of the Deployment, by your own rights there; 0 is possible, too.
    """
    from honed.cli.run import parse_replicas
    from honed.v1 import conductor_pb2, conductor_pb2_grpc

    asked = parse_replicas(services, least=0 if (cluster := find_cluster(run, address)) else 1)
    if cluster:
        from honed.cluster.scale import scale as scale_deployments

        pods = scale_deployments(cluster.cluster, dict(asked), timeout)
        _show(json, ((p.name, "yes" if p.ready else "no", p.address or "-", "-") for p in pods))
        return
    with open_peer("conductor", run, address, token_file) as peer:
        stub = conductor_pb2_grpc.ConductorServiceStub(peer.channel)
        for service, replicas in asked:
            request = conductor_pb2.SetReplicasRequest(service=service, replicas=replicas)
            answer = peer.unary(stub.SetReplicas, request, timeout)
    _show(json, ((p.name, "yes" if p.healthy else "no", p.address or "-", p.version or "-") for p in answer.run.processes))


def _show(json: bool, rows: Iterable[Sequence[str]]) -> None:
    if json:
        output.show_json([dict(zip(("name", "ready", "address", "version"), row, strict=True)) for row in rows])
    else:
        output.show(output.table(["process", "ready", "address", "version"], rows))
