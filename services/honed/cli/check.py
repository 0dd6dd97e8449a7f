"""`honed check`: looks at a run file and everything that it names before anything starts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from honed.cli import output
from honed.cli.connection import asked_cluster

if TYPE_CHECKING:
    from honed.check.findings import Report
    from honed.config import RunSettings


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: honed check run.yaml, or honed check run.yaml --cluster --json")(check)


def check(
    run_file: Annotated[Path, typer.Argument(help="The run file (YAML).", metavar="RUN_FILE")],
    json: output.JsonOption = False,
    fast: Annotated[bool, typer.Option("--fast", help="Only what takes a second or two, as `honed up` does.")] = False,
    cluster: Annotated[
        bool,
        typer.Option(
            "--cluster",
            help="Whether Kubernetes can honour it, in place of this machine: paths, addresses, stores. Asks nobody; with "
            "`honed --cluster CONTEXT/NAMESPACE check` also for Secrets, volumes, the store and Pods there.",
        ),
    ] = False,
) -> None:
    """Check a run file: data line by line, model, memory, disk, ports, Redis, database, store, scorers.

    Shows everything that it finds, each with the field or the file and line, and what to do. Starts nothing. Exit status 1 if
    the run would fail.
    """
    from honed.settings_file import load_settings

    context = asked_cluster()
    report = _for_cluster(run_file, context) if cluster or context is not None else None
    if report is None:
        report = _with_progress(load_settings(run_file), fast=fast)
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


def _for_cluster(run_file: Path, context: str | None) -> Report:
    """Whether a cluster can honour the run file, and what a namespace lacks if one is named."""
    from honed.check.cluster import check_cluster

    settings, report = check_cluster(run_file)
    if context is not None:
        from honed.check.cluster_state import check_state
        from honed.cluster.api import Cluster

        check_state(settings, Cluster.of(context), report)
    return report


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
