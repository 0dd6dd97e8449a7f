"""What a check found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Severity = Literal["error", "warning"]
SHOWN_LINES = 10


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where (a setting, a file with its line), what, and what to do."""

    severity: Severity
    where: str
    text: str


@dataclass
class Report:
    """All findings, and the figures behind them."""

    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def error(self, where: str, text: str) -> None:
        """The run would fail."""
        self.findings.append(Finding("error", where, text))

    def warning(self, where: str, text: str) -> None:
        """The run works, but perhaps not as it is meant."""
        self.findings.append(Finding("warning", where, text))

    @property
    def errors(self) -> list[Finding]:
        """The findings with which the run would fail."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @contextmanager
    def lines(self, where: str) -> Iterator[BadLines]:
        """Collects what is wrong with the lines of one file; many of one kind become one finding with their number."""
        bad = BadLines()
        try:
            yield bad
        finally:
            for text in bad.shown:
                self.error(where, text)
            if bad.count > len(bad.shown):
                self.error(where, f"{bad.count - len(bad.shown)} more lines are wrong")


@dataclass
class BadLines:
    """Lines that are wrong: the first few in words, all of them as a number."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Counts a line; `text` names file and line."""
        self.count += 1
        if len(self.shown) < SHOWN_LINES:
            self.shown.append(text)


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
