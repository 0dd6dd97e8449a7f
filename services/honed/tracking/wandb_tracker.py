"""Keeps a run in Weights & Biases: online, or in files for `wandb sync`. Imported only where that is asked for.

Online the service says how much of the run it has. Offline nobody does, and what wandb has not yet written is lost with a
process that is killed: so each start writes the run anew, as a whole, and removes the earlier directory of the same run.
"""

from __future__ import annotations

import netrc
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import wandb

from honed.tracking.port import SERIES, UPDATES, Mark, Opened, Outcome, Point, Sent, TrackedRun
from honed.tracking.settings import WandbSettings

_START_S: Final = 30.0
_SERVICE: Final = "https://api.wandb.ai"


class WandbTracker:
    """One run in one project."""

    name = "wandb"

    def __init__(self, settings: WandbSettings, directory: Path) -> None:
        """Connects to nothing yet; wandb's own files go to `wandb/` in the directory."""
        self._settings, self._directory = settings, directory
        self._online = settings.mode == "online" or (settings.mode == "auto" and has_key())
        self.store = f"{'online' if self._online else directory} {settings.entity or ''}/{settings.project}"
        self._run: Any = None

    def open(self, run: TrackedRun, known: str | None, sent: Sent) -> Opened:
        """See `Tracker`."""
        self.close()
        identity = known or uuid.uuid4().hex[:12]
        self._directory.mkdir(parents=True, exist_ok=True)
        earlier = list((self._directory / "wandb").glob(f"offline-run-*-{identity}"))
        self._run = wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            id=identity,
            name=run.name,
            dir=str(self._directory),
            mode="online" if self._online else "offline",
            resume="allow" if self._online else None,
            reinit="create_new",
            config={"settings": dict(run.parameters), "honed": dict(run.tags)},
            allow_val_change=True,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
                init_timeout=_START_S,
            ),
        )
        for series in SERIES:  # wandb's own step only grows, and after a roll-back a step comes again
            self._run.define_metric(_key(series, "step"), hidden=True)
            self._run.define_metric(f"{series}/*" if series else "*", step_metric=_key(series, "step"), step_sync=False)
        if self._online:
            return Opened(identity, self._held())
        for directory in earlier:
            if directory != Path(self._run.dir).parent:
                shutil.rmtree(directory, ignore_errors=True)
        return Opened(identity, {})

    def log(self, points: Sequence[Point]) -> None:
        """See `Tracker`."""
        for point in points:
            marks = {_key(point.series, "step"): point.step, _key(point.series, "at_ms"): point.at_ms}
            self._run.log({**point.named, **marks})

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        self._run.summary.update(dict(outcome.figures))
        for file in outcome.files:  # a copy: of a file elsewhere wandb would keep a link
            copy = shutil.copy2(file, self._run.dir)
            self._run.save(copy, base_path=self._run.dir, policy="now")
        self._run.finish(exit_code=int(outcome.state == "failed"))
        self._run = None

    def close(self) -> None:
        """See `Tracker`."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _held(self) -> dict[str, Mark]:
        """What the service has of the run."""
        held = {}
        for series in SERIES:
            at_ms, step = (self._run.summary.get(_key(series, name)) for name in ("at_ms", "step"))
            if at_ms is not None and step is not None:
                held[series] = Mark(int(at_ms), int(step))
        return held


def has_key() -> bool:
    """Whether wandb would find a key: in WANDB_API_KEY, or where `wandb login` has put it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _SERVICE).hostname
    try:
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _key(series: str, name: str) -> str:
    if series == UPDATES:
        return {"step": "update", "at_ms": "ended_at_ms"}[name]
    return f"{series}/{name}"
