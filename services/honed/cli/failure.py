"""Turns whatever a command raises into one message on stderr and exit status 1."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from honed.cli.missing import missing_package


class ReportingGroup(TyperGroup):
    """The root of the command line. With `--debug` errors pass through, traceback and all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the options before the command. `--cluster` may stand alone, before a command or another option."""
        end = next((at for at, word in enumerate(args) if word in self.commands), len(args))
        if "--cluster" in args[:end]:
            at = args.index("--cluster")
            if at + 1 == len(args) or args[at + 1] in self.commands or args[at + 1].startswith("-"):
                args = [*args[:at], "--cluster=", *args[at + 1 :]]
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # Usage errors and exits carry their own status; a broken pipe is the reader's choice. typer handles them.
            if isinstance(error, (typer.Abort, BrokenPipeError, EOFError)) or hasattr(error, "exit_code"):
                if getattr(error, "option_name", "") == "--cluster":
                    error.message = "--cluster stands before the command: honed --cluster CONTEXT/NAMESPACE COMMAND"  # type: ignore[attr-defined]
                raise
            if ctx.params.get("debug"):
                raise
            typer.echo(f"honed: {describe(error)}", err=True)
            raise typer.Exit(1) from error


def describe(error: BaseException) -> str:
    """What went wrong, in one line for a person."""
    from honed.kit.errors import root_cause

    cause = root_cause(error)
    if advice := missing_package(cause):
        return advice
    if not is_fault(cause):
        request_id = getattr(cause, "request_id", "")
        return f"{cause} (request {request_id})" if request_id else str(cause)
    return f"internal error, {type(cause).__name__}: {cause}; `honed --debug …` shows where"


def is_fault(error: BaseException) -> bool:
    """Whether an error is none that this program tells people about: its traceback is what helps."""
    from honed.client import RequestError
    from honed.kit.errors import HonedError, root_cause

    cause = root_cause(error)
    if missing_package(cause) or hasattr(cause, "exit_code"):
        return False
    return not (isinstance(cause, (RequestError, HonedError, ValueError, OSError)) and str(cause))
