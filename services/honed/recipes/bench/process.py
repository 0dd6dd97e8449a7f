"""Runs a task as a process of its own, `honed recipes run`: whatever becomes of it, the bench goes on."""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from honed import __version__
from honed.conductor.child import tied
from honed.kit.cores import available_cores
from honed.kit.errors import DataLoss, DeadlineExceeded, FailedPrecondition
from honed.recipes.bench.bench import Origin
from honed.recipes.bench.results import Task
from honed.recipes.figures import RecipeFigures
from honed.workspace import Workspace

_STOP_S: Final = 60.0
"""How long a run may take to stop its services."""
_TAIL: Final = 2_000
"""Characters of a failed run's output that are looked at for the reason."""


@dataclass(frozen=True)
class ProcessRunner:
    """A `Runner`.

    Attributes:
        runs: Directory in which each task has one of its own.
        reuse: What the runs set `reuse` to.
        limit_s: How long one may take, seconds.
    """

    runs: Path
    reuse: Path
    limit_s: float

    def __call__(self, task: Task) -> RecipeFigures:
        """See `Runner`.

        Raises:
            FailedPrecondition: The run failed; has its last words.
            DeadlineExceeded: It took too long.
            DataLoss: It left no figures that can be read.
        """
        directory = self.runs / task.label
        log = self.runs / f"{task.label}.log"
        self.runs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "honed.cli.main", "recipes", "run", task.recipe.name, "--seed", str(task.seed)]
        command += ["--directory", str(directory), "--reuse", str(self.reuse), "--fresh"]
        command += [part for change in task.changes for part in ("--set", change)]
        with log.open("wb") as output:
            child = subprocess.Popen(
                tied(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = child.wait(self.limit_s)
            except subprocess.TimeoutExpired:
                raise DeadlineExceeded(f"it was stopped after {self.limit_s:g} s; see {log}") from None
            finally:
                _stop(child)
        if status != 0:
            raise FailedPrecondition(f"it ended with status {status}: {_last_words(log)}")
        path = Workspace(directory).recipe_json
        try:
            return RecipeFigures.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataLoss(f"{path} has no figures: {error}") from error


def origin() -> Origin:
    """Of runs from here: the commit of the checkout or the release, and the machine without its name."""
    here = Path(__file__).parent
    commit = _git(here, "rev-parse", "--short=9", "HEAD")
    if commit and _git(here, "status", "--porcelain", "--", "."):
        commit += "+"  # changed since
    return Origin(commit or f"release {__version__}", f"{available_cores()} cores, {platform.machine()}")


def _git(here: Path, *arguments: str) -> str:
    try:
        found = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ends a run that is still there: it stops its services at SIGTERM, and they end with it at SIGKILL."""
    if child.poll() is not None:
        return
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace")[-_TAIL:].splitlines() if line.strip()]
    return f"{lines[-1]}; see {log}" if lines else f"it said nothing; see {log}"
