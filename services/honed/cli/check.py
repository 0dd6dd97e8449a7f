"""`honed check`: looks at a run file and everything that it names before anything starts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from honed.cli import output

if TYPE_CHECKING:
    from honed.check.findings import Report
    from honed.config import RunSettings


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: honed check run.yaml --json")(check)


def check(
    run_file: Annotated[Path, typer.Argument(help="The run file (YAML).", metavar="RUN_FILE")],
    json: output.JsonOption = False,
    fast: Annotated[bool, typer.Option("--fast", help="Only what takes a second or two, as `honed up` does.")] = False,
) -> None:
    """Check a run file: data line by line, model, memory, disk, ports, Redis, database, store, scorers.

    Shows everything that it finds, each with the field or the file and line, and what to do. Starts nothing. Exit status 1 if
    the run would fail.
    """
    from honed.settings_file import load_settings

    settings = load_settings(run_file)
    report = _with_progress(settings, fast=fast)
    if json:
        found = [asdict(finding) for finding in report.findings]
        output.show_json({"ok": not report.errors, "findings": found, "figures": report.figures})
    else:
        _show(report)
    if report.errors:
        raise typer.Exit(1)


def refuse_errors(settings: RunSettings) -> None:
    """The fast part of the check, before a run starts.

    Raises:
        ValueError: the run would fail; names everything that is wrong.
    """
    from honed.check.run import check_run

    report = check_run(settings, fast=True)
    for finding in report.findings:
        if finding.severity == "warning":
            output.note(f"honed: {finding.where}: {finding.text}")
    if report.errors:
        raise ValueError("\n".join(f"{finding.where}: {finding.text}" for finding in report.errors))


def _with_progress(settings: RunSettings, *, fast: bool) -> Report:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from honed.check.data import data_bytes
    from honed.check.run import check_run

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = output.console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking", total=data_bytes(settings))
        return check_run(settings, lambda size: progress.advance(task, size), fast=fast)


def _show(report: Report) -> None:
    rows = [(finding.severity, finding.where, finding.text) for finding in report.findings]
    if rows:
        output.show(output.table(["", "where", "what is wrong, and what to do"], rows))
    for name, bill in report.figures.items():
        if name.endswith("_gib"):
            parts = ", ".join(f"{part} {gib:g}" for part, gib in bill.items() if gib >= 0.05)
            output.note(f"{name.removesuffix('_gib').replace('_', ' ')}, GiB: {parts}")
    errors = len(report.errors)
    output.note(f"{errors} errors, {len(report.findings) - errors} warnings" if rows else "nothing is wrong")
