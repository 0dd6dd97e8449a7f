"""Finds runs by their directories, and reads what they left there: settings, record, journal, reports.

Nothing needs to run, and nothing is written. What is missing or damaged is told, not guessed.
"""

from __future__ import annotations

import difflib
import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from honed.conductor.record import PhaseStep, RunRecord, read_phases, read_record
from honed.kit.errors import DataLoss, NotFound
from honed.learner.loop.journal import read_newest_update, read_updates
from honed.learner.loop.records import UpdateRecord
from honed.tracking.parameters import figures_of, flat
from honed.workspace import Workspace

_DEEP: Final = ("", "*/", "*/*/")
_ENDED: Final = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class FoundRun:
    """One run's directory.

    Attributes:
        directory: Where.
        name: The run's.
        algorithm: Of the learner; empty if it is not known.
        started_at: Of the first start, seconds since 1970; None if it is not known.
        state: The phase that it is in; or `finished`, `stopped`, `failed`, and `interrupted` if it was killed.
        newest: The last update, without its rollouts; None before the first.
        problem: What could not be read; empty if all could.
    """

    directory: Path
    name: str
    algorithm: str
    started_at: float | None
    state: str
    newest: UpdateRecord | None
    problem: str = ""

    @property
    def updates(self) -> int:
        """How many it has made."""
        return self.newest.step if self.newest is not None else 0

    def value(self, metric: str) -> float | None:
        """A metric of the last update."""
        return self.newest.values.get(metric) if self.newest is not None else None


@dataclass(frozen=True)
class RunDetails:
    """All that a run's directory holds of it.

    Attributes:
        run: The run.
        parameters: Settings by dotted key; what lies in the run's own directory by `<directory>`.
        updates: In order; the oldest of a long run may be gone.
        phases: Steps of the phases before the online loop.
        figures: Numbers of the reports.
        missing: What is not there, in words.
    """

    run: FoundRun
    parameters: Mapping[str, str]
    updates: Sequence[UpdateRecord]
    phases: Sequence[PhaseStep]
    figures: Mapping[str, float]
    missing: Sequence[str] = field(default_factory=tuple)


def find_runs(root: Path) -> list[FoundRun]:
    """The runs at a root or up to two levels below it, the newest first.

    Raises:
        NotFound: there is no such directory.
    """
    if not root.is_dir():
        raise NotFound(f"{root} is no directory: name one that runs lie in by --root")
    directories = {path.parent: None for deep in _DEEP for path in sorted(root.glob(f"{deep}run.lock"))}
    return sorted(map(read_run, directories), key=lambda run: -(run.started_at or 0.0))


def choose(asked: Sequence[str], root: Path) -> list[FoundRun]:
    """The runs of these names or directories, in their order.

    Raises:
        NotFound: a name is none, or the directory of none; names what there is.
        ValueError: a name is that of several runs, or a run is named twice.
    """
    chosen: list[FoundRun] = []
    below: list[FoundRun] | None = None
    for name in asked:
        if (Path(name) / "run.lock").is_file():
            run = read_run(Path(name))
        else:
            below = find_runs(root) if below is None else below
            run = _named(name, root, below)
        if any(run.directory.resolve() == other.directory.resolve() for other in chosen):
            raise ValueError(f"{name} is named twice: {run.directory}")
        chosen.append(run)
    return chosen


def read_run(directory: Path) -> FoundRun:
    """What a directory says of its run at once."""
    workspace = Workspace(directory)
    record, settings = read_record(workspace), _settings(workspace)
    problem, newest = "", None
    try:
        newest = read_newest_update(workspace.learner)
    except (DataLoss, OSError) as error:
        problem = str(error)
    learner = settings.get("learner")
    algorithm = record.algorithm if record else str(learner.get("algorithm", "")) if isinstance(learner, dict) else ""
    name = record.run if record else str(settings.get("run", directory.resolve().name))
    return FoundRun(directory, name, algorithm, _started_at(workspace, record), _state(workspace, record), newest, problem)


def read_details(run: FoundRun) -> RunDetails:
    """All of a run. What is damaged is among what is missing."""
    workspace = Workspace(run.directory)
    missing = [run.problem] if run.problem else []
    updates: list[UpdateRecord] = []
    try:
        updates = read_updates(workspace.learner)
    except (DataLoss, OSError) as error:
        missing = [str(error)]
    if not updates and not missing:
        missing.append("no update of the learner")
    settings = _settings(workspace)
    if not settings:
        missing.append(f"no settings ({workspace.effective_settings.name})")
    if not workspace.report_json.is_file():
        missing.append(f"no report ({workspace.report_json.name}): it is written when training ends")
    own = str(settings.get("directory", run.directory))
    parameters = {key: value.replace(own, "<directory>") for key, value in flat(settings).items() if key != "directory"}
    phases = list(read_phases(workspace.phase_curves))
    return RunDetails(run, parameters, updates, phases, figures_of(workspace), missing)


def _named(name: str, root: Path, runs: Sequence[FoundRun]) -> FoundRun:
    same_directory = [run for run in runs if run.directory.resolve().name == name]
    found = same_directory if len(same_directory) == 1 else [run for run in runs if name in (run.name, run.directory.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{len(found)} runs have the name {name}: name one by its directory: {_listed(found)}")
    known = {text for run in runs for text in (run.name, run.directory.name)}
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; there are {_listed(runs)}" if runs else "; there is no run"
    raise NotFound(f"no run {name!r} in {root}, and no directory of that name holds one{hint}")


def _listed(runs: Sequence[FoundRun]) -> str:
    return ", ".join(str(run.directory) for run in runs)


def _settings(workspace: Workspace) -> dict[str, Any]:
    """The settings that the run was started with last, as they were written: another release may have."""
    try:
        tree = yaml.safe_load(workspace.effective_settings.read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _started_at(workspace: Workspace, record: RunRecord | None) -> float | None:
    if record is not None:
        return record.started_at
    try:  # of a release before there were records: when it was started last
        return workspace.effective_settings.stat().st_mtime
    except OSError:
        return None


def _state(workspace: Workspace, record: RunRecord | None) -> str:
    if _is_held(workspace):
        return record.state if record is not None else "running"
    if record is not None:
        return record.state if record.state in _ENDED else "interrupted"
    return _reported(workspace) or "interrupted"


def _is_held(workspace: Workspace) -> bool:
    """Whether a process runs in the directory: it says where its services are, and holds the lock."""
    if not workspace.endpoints.exists():
        return False
    try:
        with workspace.lock.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _reported(workspace: Workspace) -> str:
    try:
        report = json.loads(workspace.report_json.read_text())
    except (OSError, ValueError):
        return ""
    return str(report.get("outcome", "finished")) if isinstance(report, dict) else ""
