"""`honed cluster secrets`: what a run on a cluster needs before its Pods start."""

from __future__ import annotations

import os

import typer

from honed.cli import output


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(no_args_is_help=True, help="What a run on Kubernetes needs before its Pods start.")
    group.command(epilog="Example: honed --cluster kind-honed/honed cluster secrets")(secrets)
    app.add_typer(group, name="cluster")


def secrets(json: output.JsonOption = False) -> None:
    """Make the Secrets that are missing: a token for each service and for people, and passwords of Redis and the database.

    What is there is never changed. Safe to repeat, and for several to do at once. In a Pod it works in the Pod's own namespace;
    elsewhere `--cluster` says where. Needs the rights to get and to create Secrets there.
    """
    from honed.cli.connection import asked_cluster
    from honed.cluster.api import Cluster
    from honed.cluster.secrets import ensure_secrets

    cluster = Cluster.of(asked_cluster() or "", os.environ)
    made = ensure_secrets(cluster)
    if json:
        output.show_json({"namespace": cluster.name, "made": made.made, "found": made.found})
        return
    for name in made.made:
        typer.echo(f"made {name}")
    output.note(f"namespace {cluster.name}: {len(made.made)} Secrets made, {len(made.found)} were there")
