"""Turns whatever a command raises into one message on stderr and exit status 1."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from honed.cli.missing import missing_package


class ReportingGroup(TyperGroup):
    """The root of the command line. With `--debug` errors pass through, traceback and all."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # Usage errors and exits carry their own status; a broken pipe is the reader's choice. typer handles them.
            if isinstance(error, (typer.Abort, BrokenPipeError, EOFError)) or hasattr(error, "exit_code"):
                raise
            if ctx.params.get("debug"):
                raise
            typer.echo(f"honed: {describe(error)}", err=True)
            raise typer.Exit(1) from error


def describe(error: BaseException) -> str:
    """What went wrong, in one line for a person."""
    from honed.client import RequestError
    from honed.kit.errors import HonedError, root_cause

    cause = root_cause(error)
    if advice := missing_package(cause):
        return advice
    if isinstance(cause, (RequestError, HonedError, ValueError, OSError)) and str(cause):
        request_id = getattr(cause, "request_id", "")
        return f"{cause} (request {request_id})" if request_id else str(cause)
    return f"internal error, {type(cause).__name__}: {cause}; `honed --debug …` shows where"
