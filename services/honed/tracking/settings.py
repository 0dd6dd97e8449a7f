"""The run file's section on experiment tracking: where a run's settings, metrics and reports are sent as well."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field, field_validator

from honed.settings import Seconds, Section

_SCHEMES: Final = ("http", "https", "file", "sqlite")


class MlflowSettings(Section):
    """MLflow: a server, or files of one machine."""

    uri: str | None = Field(
        None,
        description="http:// or https:// of a server, a directory, or sqlite:////FILE. Unset: MLFLOW_TRACKING_URI; without "
        "that, `mlruns` beside the directory of the run (where services run elsewhere: inside of it). Credentials: "
        "MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD.",
    )
    experiment: str = Field("honed", min_length=1, max_length=256, description="Made when it is not there.")

    @field_validator("uri")
    @classmethod
    def _is_a_store(cls, uri: str | None) -> str | None:
        if uri is not None:
            check_mlflow_uri(uri)
        return uri


class WandbSettings(Section):
    """Weights & Biases."""

    project: str = Field("honed", min_length=1, max_length=128)
    entity: str | None = Field(None, min_length=1, description="A user or a team. Unset: the key's own.")
    mode: Literal["auto", "online", "offline"] = Field(
        "auto",
        description="offline: files for `wandb sync`, in <directory>/wandb. auto: online where there is a key "
        "(WANDB_API_KEY or `wandb login`), else offline.",
    )


class TensorboardSettings(Section):
    """TensorBoard's event files."""

    directory: Path | None = Field(None, description="Unset: <directory>/tensorboard; `tensorboard --logdir out` finds it.")


class TrackingSettings(Section):
    """Where a run is tracked, beside its own journal and report. A section that is left out is off; `{}` takes its defaults."""

    mlflow: MlflowSettings | None = None
    wandb: WandbSettings | None = None
    tensorboard: TensorboardSettings | None = None
    stop_s: Seconds = Field(10.0, description="How long the end of a run waits for what is not sent yet.")


def mlflow_path(uri: str) -> Path | None:
    """Where on this machine an MLflow store lies; None for a server."""
    if uri.startswith("sqlite:///"):
        return Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("file:"):
        return Path(unquote(urlsplit(uri).path))
    return None if "://" in uri else Path(uri)


def check_mlflow_uri(uri: str) -> None:
    """Asserts that a URI names a store that honed writes to.

    Raises:
        ValueError: it does not; says what does.
    """
    if "://" not in uri and not uri.startswith("file:"):
        if ":" in uri or not uri.strip():
            raise ValueError("is no MLflow store: name http://HOST:PORT, a directory, or sqlite:////FILE")
        return
    parts = urlsplit(uri)
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"names a store of the kind {parts.scheme}: take http, https, a directory, or sqlite")
    if parts.scheme in ("http", "https") and not parts.hostname:
        raise ValueError("names no host: write http://HOST:PORT")
    if parts.scheme in ("file", "sqlite") and (parts.netloc or len(parts.path.strip("/")) == 0):
        raise ValueError(f"names no file of this machine: write {parts.scheme}:///PATH" + "/FILE" * (parts.scheme == "sqlite"))
