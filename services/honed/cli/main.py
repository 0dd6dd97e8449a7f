"""`honed`: one command with a sub-command for each thing that people do with a run.

Exit status: 0 done, 1 failed with one message on stderr, 2 wrong usage. What a command needs, it imports when it runs: the help
is there at once.
"""

from __future__ import annotations

from typing import Annotated, Final

import typer

from honed import __version__
from honed.cli import (
    check,
    cluster,
    config,
    data,
    dead,
    generate,
    init,
    judge,
    prompts,
    recipes,
    run,
    runs,
    scale,
    score,
    status,
    tokens,
    top,
    versions,
    wait,
)
from honed.cli.connection import ask_cluster, check_no_cluster
from honed.cli.failure import ReportingGroup

_OF_THIS_MACHINE: Final = frozenset({"init", "up", "demo", "serve", "job", "wait", "tokens", "config", "recipes", "runs"})
"""Commands that talk to no run. Of `data` some do: the others say so themselves."""

app = typer.Typer(
    name="honed",
    cls=ReportingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"honed {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Begin with `honed demo`, or `honed up --run-file run.yaml`; on a cluster with `honed --cluster status`. "
    "Each command's --help has an example."
)
def honed(
    context: typer.Context,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            envvar="HONED_CLUSTER",
            metavar="[CONTEXT/NAMESPACE]",
            help="Talk to a run on Kubernetes: a context of your kubeconfig, a /NAMESPACE, or both. Left out: the current "
            "context, its namespace or `honed`. Token and certificate come from the run's Secrets, if you may read them.",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", envvar="HONED_DEBUG", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Keeps a language model sharp on live feedback while it serves."""
    source = context.get_parameter_source("cluster")
    explicit = source is not None and source.name == "COMMANDLINE"
    ask_cluster(cluster, explicit=explicit)
    if context.invoked_subcommand in _OF_THIS_MACHINE:
        check_no_cluster(context.invoked_subcommand)


run.register(app)
for part in (
    *(init, check, generate, score, judge, status, top, scale, versions, prompts, dead),
    *(cluster, wait, tokens, config, data, recipes, runs),
):
    part.register(app)


def main() -> None:
    """Runs the command line of this process."""
    app(prog_name="honed")


if __name__ == "__main__":
    main()
