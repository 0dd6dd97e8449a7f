"""`honed runs`: the runs of this machine, as a list and side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from honed.cli import output

if TYPE_CHECKING:
    from honed.runs.comparison import Comparison, Row

RootOption = Annotated[
    Path, typer.Option("--root", help="Where the runs' directories lie: it is one, or they are up to two levels below it.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Runs on this machine, past and present; read from their directories, whether tracked or not.",
    )
    group.command("list", epilog="Example: honed runs list --root /data/runs")(list_runs)
    group.command(epilog="Example: honed runs compare grpo out/ppo-2 --html compare.html")(compare)
    app.add_typer(group, name="runs")


def list_runs(root: RootOption = Path("out"), json: output.JsonOption = False) -> None:
    """Show the runs, the newest first: name, algorithm, start, updates, last score and KL, state, directory."""
    from honed.runs.comparison import finite, formatted
    from honed.runs.found import find_runs

    runs = find_runs(root)
    if json:
        rows = [
            {
                "name": run.name,
                "algorithm": run.algorithm,
                "started_at": run.started_at,
                "updates": run.updates,
                "score": finite(run.value("score_mean")),
                "kl": finite(run.value("kl")),
                "state": run.state,
                "directory": str(run.directory),
                "problem": run.problem,
            }
            for run in runs
        ]
        output.show_json(rows)
        return
    if not runs:
        output.note(f"no run in {root}: its directory has a file run.lock, which `honed up` makes")
        return
    columns = ("run", "algorithm", "started", "updates", "score", "KL", "state", "directory")
    cells = [
        (
            *(run.name, run.algorithm or "–", _moment(run.started_at), str(run.updates)),
            *(formatted(run.value("score_mean")), formatted(run.value("kl")), run.state, str(run.directory)),
        )
        for run in runs
    ]
    output.show(output.table(columns, cells, numbers=("updates", "score", "KL")))
    for run in runs:
        if run.problem:
            output.note(f"{run.name}: {run.problem}")


def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Names or directories, two or more; `honed runs list` shows them.", metavar="RUN...")
    ],
    root: RootOption = Path("out"),
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with curves there; it needs nothing beside it.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="Draw this one too (docs/metrics.md); may be repeated.")
    ] = None,
    json: output.JsonOption = False,
) -> None:
    """Show runs side by side: settings that differ, and figures of updates and reports.

    What a run does not have is a dash, and is said below.
    """
    from honed.runs.comparison import compare as compared
    from honed.runs.found import choose, read_details

    if len(runs) < 2:
        raise typer.BadParameter("name two runs or more", param_hint="RUN...")
    comparison = compared([read_details(run) for run in choose(runs, root)])
    if json:
        output.show_json(comparison.as_json())
    else:
        _show(comparison)
    if html is not None:
        from honed.runs.page import write_page

        write_page(html, comparison, metric or ())
        output.note(f"written: {html}")


def _show(comparison: Comparison) -> None:
    names = _distinct([each.run.name for each in comparison.runs], [str(each.run.directory) for each in comparison.runs])
    if comparison.parameters:
        output.show(output.table(["setting", *names], _cells(comparison.parameters)))
    else:
        output.note("all settings are the same")
    typer.echo()
    output.show(output.table(["figure", *names], _cells(comparison.figures), numbers=names))
    for name, each in zip(names, comparison.runs, strict=True):
        for text in each.missing:
            output.note(f"{name}: {text}")


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    from honed.runs.comparison import formatted

    return [[row.name, *(output.shortened(formatted(value)) for value in row.values)] for row in rows]


def _distinct(names: list[str], directories: list[str]) -> list[str]:
    """Names, and directories where two runs share a name."""
    return names if len(set(names)) == len(names) else directories


def _moment(at: float | None) -> str:
    return "–" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
