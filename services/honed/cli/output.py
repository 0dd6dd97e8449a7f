"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

_PIPE_WIDTH = 200
_KEPT = "\n\t"


def console(*, stderr: bool = False) -> Console:
    """A console that never guesses colours into what it is given, and does not squeeze tables into a pipe."""
    from rich.console import Console

    piped = not (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=_PIPE_WIDTH if piped else None, markup=False, highlight=False, emoji=False)


def show(renderable: RenderableType) -> None:
    """Prints to stdout."""
    console().print(renderable)


def note(text: str) -> None:
    """Tells a person something beside the result."""
    typer.echo(text, err=True)


def show_json(value: Any) -> None:
    """Prints one JSON value as one line."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = ()) -> RenderableType:
    """A table; columns named in `numbers` stand at the right."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, header_style="dim", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


@contextmanager
def progress(doing: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows progress on stderr when that is a terminal; yields what is called with how many more are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda count: bar.advance(task, count)


def pairs(values: Mapping[str, str]) -> RenderableType:
    """Names and values, one pair a line."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 3))
    for name, value in values.items():
        made.add_row(Text(name, style="dim"), Text(printable(value)))
    return made


def printable(text: str) -> str:
    """Text of a model or a stranger without control characters, which could speak to the terminal."""
    return "".join(c if c.isprintable() or c in _KEPT else "\N{REPLACEMENT CHARACTER}" for c in text)


def shortened(text: str, width: int = 60) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
