"""What a load test prints: tables for people, and as the last line of stdout one JSON object for programs."""

from __future__ import annotations

import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from honed.kit.errors import HonedError
from loadtest.stats import Quantiles

_PIPE_WIDTH = 160


def progress(*fields: str) -> Progress:
    """A progress bar on stderr; `fields` names values that the task carries and the bar shows."""
    shown = [TextColumn(f"{name} {{task.fields[{name}]}}") for name in fields]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *shown, TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def latency_table(title: str, rows: Mapping[str, Quantiles | None]) -> Table:
    """Percentiles, a line each."""
    table = Table("", "p50 ms", "p90 ms", "p99 ms", "n", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in rows.items():
        table.add_row(name, *(("-", "-", "-", "0") if row is None else _cells(row)))
    return table


def _cells(row: Quantiles) -> tuple[str, ...]:
    return (*(f"{value:,.1f}" for value in (row.p50_ms, row.p90_ms, row.p99_ms)), f"{row.count:,}")


def figures_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Figures; the first column names, the others count."""
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def pairs_table(title: str, limit: str, ours: str, unit: str, pairs: Sequence[tuple[float, float]]) -> Table:
    """Interleaved pairs (limit, ours) of rates with their ratios, and the medians."""
    rows: list[tuple[str, ...]] = [
        (str(number), f"{a:,.0f}", f"{b:,.0f}", f"{b / a:.3f}") for number, (a, b) in enumerate(pairs, 1)
    ]
    medians = (f"{statistics.median(side):,.0f}" for side in zip(*pairs, strict=True))
    rows.append(("median", *medians, f"{median_ratio(pairs):.3f}"))
    return figures_table(title, ("pair", f"{limit} {unit}", f"{ours} {unit}", "ratio"), rows)


def median_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """The median of ours / limit over the pairs. Not the ratio of the medians: the two of a pair saw the same machine."""
    return statistics.median(ours / limit for limit, ours in pairs)


def show(*tables: Table) -> None:
    """Prints tables; a pipe has no width that they would have to fit."""
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    for table in tables:
        console.print(table)


def run(command: Callable[[], None]) -> None:
    """Runs a command; what a person can put right is told in one line, without a traceback.

    SIGTERM ends it as Ctrl-C does, with everything that it has started.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
    except (HonedError, ValueError, OSError, TimeoutError) as error:
        print(f"loadtest: {error or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("loadtest: interrupted", file=sys.stderr)
        sys.exit(130)


def finish(figures: Mapping[str, Any]) -> None:
    """Prints the last line."""
    print(json.dumps(figures, allow_nan=False), flush=True)


def rounded(value: float) -> float:
    """Four significant digits are more than a benchmark knows."""
    return float(f"{value:.4g}")
