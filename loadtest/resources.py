"""Memory, processor time and open files of a process and its descendants, from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Final

SETTLED_S: Final = 60.0
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


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time that the processes have used, and those children of theirs that have ended; who is gone counts nothing."""
    ticks = 0
    for pid in pids:
        try:
            # Behind the name in parentheses: 11 fields, then user and system time, of itself and of ended children.
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """What a service held at one time.

    Attributes:
        at_s: seconds, monotonic.
        pid: of its process.
        usage: what it held.
    """

    at_s: float
    pid: int
    usage: Usage


@dataclass(frozen=True)
class Growth:
    """How a service's last third compares with its middle third, in means.

    Attributes:
        memory: ratio.
        files: ratio of open files.
        more_files: their difference.
    """

    memory: float
    files: float
    more_files: float


@dataclass
class ResourceLog:
    """Samples of usage by the name of a service, to tell whether it is flat."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def add(self, name: str, pid: int, usage: Usage) -> None:
        """Notes what a service holds now."""
        self.samples.setdefault(name, []).append(Sample(time.monotonic(), pid, usage))

    def growth(self) -> Mapping[str, Growth]:
        """The growth of each service.

        A process counts when it has been seen for `SETTLED_S`: one that was just started again is small for a while.
        """
        return {name: growth for name, rows in self.samples.items() if (growth := _growth(rows)) is not None}

    def write(self, path: Path) -> None:
        """Writes every sample as a line of CSV."""
        with path.open("w") as file:
            file.write("service,at_s,pid,memory,files\n")
            for name, rows in self.samples.items():
                file.writelines(f"{name},{r.at_s:.1f},{r.pid},{r.usage.memory},{r.usage.files}\n" for r in rows)


def _growth(rows: Sequence[Sample]) -> Growth | None:
    first_seen: dict[int, float] = {}
    for row in rows:
        first_seen.setdefault(row.pid, row.at_s)
    start, end = rows[0].at_s, rows[-1].at_s
    third = (end - start) / 3
    settled = [row for row in rows if row.at_s - first_seen[row.pid] >= SETTLED_S]
    middle = [row.usage for row in settled if start + third <= row.at_s < start + 2 * third]
    last = [row.usage for row in settled if row.at_s >= start + 2 * third]
    if not middle or not last:
        return None
    memory, memory_before = (fmean(usage.memory for usage in part) for part in (last, middle))
    files, files_before = (fmean(usage.files for usage in part) for part in (last, middle))
    return Growth(memory / max(1.0, memory_before), files / max(1.0, files_before), files - files_before)


def _parent(entry: Path) -> int | None:
    try:
        # The name in parentheses may hold anything, spaces too.
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None
