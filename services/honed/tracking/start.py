"""From the settings to the trackers: which are asked for, whether they can be, and how each is made.

Their libraries are loaded by those that ask for them, and in the thread that will use them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Final

from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition
from honed.tracking.port import Tracker
from honed.tracking.settings import TrackingSettings, check_mlflow_uri, mlflow_path

ENVIRONMENT: Final = {
    # From 3.13 on MLflow refuses files without this, and they need no server and no database.
    "MLFLOW_ALLOW_FILE_STORE": "true",
    # Its own retries would hold a call for minutes; `sender` tries again.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # Who tracks a run has not asked for reports on that to the libraries' makers.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    # The terminal shows the run.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "WANDB_SILENT": "true",
}
"""What the libraries read, where nobody has set it otherwise."""

MLFLOW_URI: Final = "MLFLOW_TRACKING_URI"
_PACKAGES: Final = {"mlflow": ("mlflow",), "wandb": ("wandb",), "tensorboard": ("tensorboardX",)}


def asked_for(settings: TrackingSettings) -> list[str]:
    """The trackers that the run file asks for."""
    return [name for name in _PACKAGES if getattr(settings, name) is not None]


def check_tracking(settings: RunSettings, environment: Mapping[str, str] = os.environ) -> None:
    """Asserts that what is asked for can be.

    Raises:
        FailedPrecondition: a package is not installed; names the extra.
        ValueError: MLFLOW_TRACKING_URI is set and is no store.
    """
    for name in asked_for(settings.tracking):
        lacking = [package for package in _packages(settings, name, environment) if importlib.util.find_spec(package) is None]
        if lacking:
            raise FailedPrecondition(
                f"tracking.{name} is set, and the package {lacking[0]} is not installed: install honed[{name}], or remove "
                f"tracking.{name}"
            )
    if settings.tracking.mlflow is not None and settings.tracking.mlflow.uri is None and environment.get(MLFLOW_URI):
        try:
            check_mlflow_uri(environment[MLFLOW_URI])
        except ValueError as error:
            raise ValueError(f"{MLFLOW_URI} {error}; tracking.mlflow.uri comes before it") from None


def makers(settings: RunSettings) -> dict[str, Callable[[], Tracker]]:
    """How each tracker that is asked for is made."""
    for name, value in ENVIRONMENT.items() if asked_for(settings.tracking) else ():
        os.environ.setdefault(name, value)
    return {name: _MAKERS[name](settings) for name in asked_for(settings.tracking)}


def mlflow_uri(settings: RunSettings, environment: Mapping[str, str] = os.environ) -> str:
    """Where MLflow keeps the run: the run file, else MLFLOW_TRACKING_URI, else a directory `mlruns`.

    That is beside the run's own, so that runs side by side share it and it outlives a fresh start; of a conductor whose
    services run elsewhere inside of it, since that may be all that it can write to.
    """
    section, own = settings.tracking.mlflow, settings.directory.absolute()
    beside = own if settings.conductor.services_elsewhere else own.parent
    uri = (section and section.uri) or environment.get(MLFLOW_URI) or str(beside / "mlruns")
    path = mlflow_path(uri)
    if path is None:
        return uri
    return f"sqlite:///{path.absolute()}" if uri.startswith("sqlite:") else path.absolute().as_uri()


def _packages(settings: RunSettings, name: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    of_sqlite = name == "mlflow" and mlflow_uri(settings, environment).startswith("sqlite:")
    return (*_PACKAGES[name], "sqlalchemy", "alembic") if of_sqlite else _PACKAGES[name]


def _mlflow(settings: RunSettings) -> Callable[[], Tracker]:
    section = settings.tracking.mlflow
    assert section is not None
    uri, experiment = mlflow_uri(settings), section.experiment

    def make() -> Tracker:
        from honed.tracking.mlflow_tracker import MlflowTracker

        return MlflowTracker(uri, experiment)

    return make


def _wandb(settings: RunSettings) -> Callable[[], Tracker]:
    section = settings.tracking.wandb
    assert section is not None

    def make() -> Tracker:
        from honed.tracking.wandb_tracker import WandbTracker

        return WandbTracker(section, settings.directory.absolute())

    return make


def _tensorboard(settings: RunSettings) -> Callable[[], Tracker]:
    section = settings.tracking.tensorboard
    assert section is not None
    directory = (section.directory or settings.directory / "tensorboard").absolute()

    def make() -> Tracker:
        from honed.tracking.tensorboard_tracker import TensorboardTracker

        return TensorboardTracker(directory)

    return make


_MAKERS: Final[Mapping[str, Callable[[RunSettings], Callable[[], Tracker]]]] = {
    "mlflow": _mlflow,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
}
