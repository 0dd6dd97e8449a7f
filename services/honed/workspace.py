"""Where things lie in a run's directory: one place that names every path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """The directory of one run."""

    root: Path

    @property
    def logs(self) -> Path:
        """One file a process."""
        return self.root / "logs"

    @property
    def progress(self) -> Path:
        """One file a job: how far it is."""
        return self.root / "progress"

    @property
    def effective_settings(self) -> Path:
        """The run file that the processes of a local run were started with."""
        return self.root / "effective.yaml"

    @property
    def redis(self) -> Path:
        """The embedded Redis."""
        return self.root / "redis"

    @property
    def base_model(self) -> Path:
        """The language model that the run starts from."""
        return self.root / "models" / "base"

    @property
    def reward_model(self) -> Path:
        """The reward model that the reward-model phase trained."""
        return self.root / "models" / "reward"

    @property
    def reward_snapshot(self) -> Path:
        """Content hash of the judgements behind the reward model."""
        return self.root / "models" / "reward.snapshot"

    @property
    def learner(self) -> Path:
        """Checkpoints and journal of the learner."""
        return self.root / "learner"

    @property
    def versions(self) -> Path:
        """Versions that a generator has fetched."""
        return self.root / "generation" / "versions"
