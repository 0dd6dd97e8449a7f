"""Memory and open files of a process and its descendants, from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """What a set of processes holds: private memory in bytes (resident less shared), and open files."""

    memory: int
    files: int


def descendants(pid: int) -> list[int]:
    """The process and all that it started and that still live."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        left += children.get(found[-1], [])
    return found


def usage(pids: Sequence[int]) -> Usage:
    """What the processes hold now; those that are gone count nothing."""
    memory = files = 0
    for pid in pids:
        try:
            _, resident, shared, *_ = (int(word) for word in Path(f"/proc/{pid}/statm").read_text().split())
            files += len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue
        memory += (resident - shared) * _PAGE_BYTES
    return Usage(memory, files)


@dataclass
class ResourceLog:
    """Samples of usage by the name of a service, to tell whether it is flat."""

    samples: dict[str, list[tuple[float, Usage]]] = field(default_factory=dict)

    def add(self, name: str, sample: Usage) -> None:
        """Notes a sample, now."""
        self.samples.setdefault(name, []).append((time.monotonic(), sample))

    def growth(self) -> Mapping[str, tuple[float, float]]:
        """For each service the growth of memory and of open files: median of the last third over that of the middle third.

        Medians, because a process that was just started again is small for a while.
        """
        return {name: _growth(rows) for name, rows in self.samples.items() if len(rows) >= 9}


def _growth(rows: Sequence[tuple[float, Usage]]) -> tuple[float, float]:
    start, end = rows[0][0], rows[-1][0]
    third = (end - start) / 3
    middle = [sample for at, sample in rows if start + third <= at < start + 2 * third]
    last = [sample for at, sample in rows if at >= start + 2 * third]
    return (
        _median([s.memory for s in last]) / max(1.0, _median([s.memory for s in middle])),
        _median([s.files for s in last]) / max(1.0, _median([s.files for s in middle])),
    )


def _median(values: Sequence[int]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return float(ordered[half]) if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _parent(entry: Path) -> int | None:
    try:
        # The name in parentheses may hold anything, spaces too.
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None
