"""`honed`: one command with a sub-command for each thing that people do with a run.

Exit status: 0 done, 1 failed with one message on stderr, 2 wrong usage. What a command needs, it imports when it runs: the help
is there at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from honed import __version__
from honed.cli import check, config, data, dead, generate, init, judge, prompts, run, scale, score, status, tokens, versions
from honed.cli.failure import ReportingGroup

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


@app.callback(epilog="Begin with `honed demo`, or `honed up --run-file run.yaml`. Each command's --help has an example.")
def honed(
    debug: Annotated[bool, typer.Option("--debug", envvar="HONED_DEBUG", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Keeps a language model sharp on live feedback while it serves."""


run.register(app)
for part in (init, check, generate, score, judge, status, scale, versions, prompts, dead, tokens, config, data):
    part.register(app)


def main() -> None:
    """Runs the command line of this process."""
    app(prog_name="honed")


if __name__ == "__main__":
    main()
