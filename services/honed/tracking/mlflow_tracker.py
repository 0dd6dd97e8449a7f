"""Keeps a run in MLflow: a server by URL, SQLite, or a directory of files.

Imported only where that is asked for, with the environment that `start` sets before.

Every point ends with a marker metric of its series (`update`, or `pretrain/step`), so that the store itself says how much of a
run it has. A server adds a batch as a whole; the file store may have taken half of the batch in which this process was killed,
so there the first points after an opening are compared with what it has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from honed.settings_file import has_password, without_password
from honed.tracking.port import SERIES, Mark, Opened, Outcome, Point, Sent, TrackedRun

_MOST_METRICS: Final = 1000  # of one call, as servers take them
_TEXT_LIMITS: Final = (6000, 500, 250)  # characters of a parameter: servers of today, and of two times before
_MOST_TAG: Final = 5000
_MOST_PARAMETERS: Final = 100
_REFUSED: Final = re.compile(r"[^\w\-. :/]", re.ASCII)
_GONE: Final = "RESOURCE_DOES_NOT_EXIST"
_STATUS: Final = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_RUNNING: Final = "RUNNING"


class MlflowTracker:
    """One run in one MLflow store."""

    name = "mlflow"

    def __init__(self, uri: str, experiment: str) -> None:
        """Connects to nothing yet.

        Args:
            uri: of a server, `sqlite:////FILE`, or `file:///DIRECTORY`.
            experiment: made when it is not there.
        """
        self._experiment = experiment
        self._uri = uri
        self.store = f"{without_password(uri) if has_password(uri) else uri} {experiment}"
        self._id = ""
        self._ended = False
        self._unsure: set[str] = set()
        self._connected: MlflowClient | None = None

    @property
    def _client(self) -> MlflowClient:
        if self._connected is None:  # in the tracker's thread: SQLite makes its tables here
            self._connected = MlflowClient(self._uri)
        return self._connected

    def open(self, run: TrackedRun, known: str | None, sent: Sent) -> Opened:
        """See `Tracker`. What a resumed run has changed of its settings becomes tags: MLflow lets no parameter be changed."""
        there = self._find(known)
        if there is None:
            there = self._client.create_run(
                self._experiment_id(),
                start_time=int(run.started_at * 1000),
                run_name=run.name,
                tags={f"honed.{name}": value[:_MOST_TAG] for name, value in run.tags.items()},
            )
            held: dict[str, Mark] = {}
        else:
            marks = {series: self._held(there.info.run_id, series) for series in SERIES}
            held = {series: mark for series, mark in marks.items() if mark is not None}
        self._id, self._ended = there.info.run_id, there.info.status != _RUNNING
        self._add_parameters(run.parameters, there.data.params)
        self._unsure = set(SERIES) if self._uri.startswith("file:") else set()
        return Opened(self._id, held)

    def log(self, points: Sequence[Point]) -> None:
        """See `Tracker`."""
        if self._ended:
            self._client.update_run(self._id, status=_RUNNING)
            self._ended = False
        batch: list[Metric] = []
        for point in points:
            metrics = self._metrics(point)
            if len(batch) + len(metrics) > _MOST_METRICS:
                self._client.log_batch(self._id, metrics=batch)
                batch = []
            batch += metrics
        self._client.log_batch(self._id, metrics=batch)

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        known = self._client.get_run(self._id).data.metrics
        figures = {_accepted(name): value for name, value in outcome.figures.items()}
        new = [
            Metric(name, value, outcome.at_ms, outcome.update) for name, value in figures.items() if known.get(name) != value
        ]
        self._client.log_batch(self._id, metrics=new)
        for file in outcome.files:
            self._client.log_artifact(self._id, str(file))
        self._client.set_terminated(self._id, _STATUS[outcome.state], end_time=outcome.at_ms)
        self._ended = True

    def close(self) -> None:
        """See `Tracker`."""
        self._connected = None

    def _find(self, known: str | None) -> Run | None:
        """The run as it is kept; None if it is gone, or lies among the deleted."""
        if known is None:
            return None
        try:
            found = self._client.get_run(known)
        except MlflowException as error:
            if error.error_code != _GONE:
                raise
            return None
        return found if found.info.lifecycle_stage == "active" else None

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is not None:
            if found.lifecycle_stage != "active":
                raise MlflowException(f"the experiment {self._experiment!r} is deleted: restore it, or name another")
            return str(found.experiment_id)
        # Of a database MLflow would put artifacts where this process happens to run.
        beside = Path(self._uri.removeprefix("sqlite:///")).parent / "mlartifacts" if self._uri.startswith("sqlite:") else None
        return str(self._client.create_experiment(self._experiment, artifact_location=beside and beside.as_uri()))

    def _held(self, run_id: str, series: str) -> Mark | None:
        """The newest point of a series that is there as a whole."""
        history = self._client.get_metric_history(run_id, _marker(series))
        return max((Mark(metric.timestamp, metric.step) for metric in history), default=None)

    def _metrics(self, point: Point) -> list[Metric]:
        metrics = [Metric(_accepted(name), value, point.at_ms, point.step) for name, value in sorted(point.named.items())]
        if point.series in self._unsure:
            self._unsure.discard(point.series)
            metrics = [metric for metric in metrics if not self._has(metric)]
        return [*metrics, Metric(_marker(point.series), float(point.step), point.at_ms, point.step)]

    def _has(self, wanted: Metric) -> bool:
        history = self._client.get_metric_history(self._id, wanted.key)
        return any((metric.step, metric.timestamp) == (wanted.step, wanted.timestamp) for metric in history)

    def _add_parameters(self, wanted: Mapping[str, str], there: Mapping[str, str]) -> None:
        """Adds what is not there yet. A text that the server finds too long is cut to what older ones take."""
        new = {_accepted(name): value for name, value in wanted.items() if _accepted(name) not in there}
        kept = {_accepted(name): value for name, value in wanted.items() if _accepted(name) in there}
        changed = {name: value for name, value in kept.items() if not _same(value, there[name])}
        for limit in _TEXT_LIMITS:
            try:
                names = list(new)
                for start in range(0, len(names), _MOST_PARAMETERS):
                    part = names[start : start + _MOST_PARAMETERS]
                    self._client.log_batch(self._id, params=[Param(name, _cut(new[name], limit)) for name in part])
                break
            except MlflowException as error:
                if limit == _TEXT_LIMITS[-1] or error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
        if changed:
            tags = [RunTag(f"honed.changed.{name}", value[:_MOST_TAG]) for name, value in changed.items()]
            self._client.log_batch(self._id, tags=tags)


def _marker(series: str) -> str:
    return f"{series}/step" if series else "update"


def _accepted(name: str) -> str:
    """A name as every MLflow takes it."""
    return _REFUSED.sub("_", name)[:250]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _same(value: str, kept: str) -> bool:
    return value == kept or (kept.endswith("…") and value.startswith(kept[:-1]))
