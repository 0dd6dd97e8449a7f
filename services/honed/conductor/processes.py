"""What the processes of a run are: one specification a service, one a job."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from honed.conductor.endpoints import ready_probe
from honed.conductor.launcher import ProcessSpec
from honed.config import RunSettings
from honed.queue.embedded import embedded_redis_command, embedded_redis_url, wait_ready
from honed.settings_file import secret_environment
from honed.workspace import Workspace

READINESS = {
    "preference": "honed.v1.PreferenceService",
    "generation": "honed.v1.GenerationService",
    "reward": "honed.v1.RewardService",
    "learner": "honed.v1.LearnerService",
}
NICE = {"learner": 10, "reward": 10}


class Processes:
    """Specifications of a local run's processes."""

    def __init__(self, settings: RunSettings, run_file: Path) -> None:
        """`run_file` holds the settings with all ports chosen; secrets go by environment."""
        self._settings = settings
        self._run_file = run_file
        self._redis_url = settings.queue.url

    @property
    def redis_url(self) -> str | None:
        """Where Redis is; None while the embedded one is not configured."""
        return self._redis_url

    def redis(self) -> ProcessSpec | None:
        """The embedded Redis; None if the settings name a Redis of their own.

        Raises:
            FailedPrecondition: there is no redis-server, or its directory cannot be used.
        """
        if self._settings.queue.url is not None:
            return None
        directory = Workspace(self._settings.directory).redis
        command = embedded_redis_command(directory, self._settings.queue.port)
        url = self._redis_url = embedded_redis_url(directory)
        return ProcessSpec("redis", command, ready=lambda: wait_ready(url, deadline_s=math.inf))

    def service(self, name: str) -> ProcessSpec:
        """A service of honed."""
        section = getattr(self._settings, name)
        command = (sys.executable, "-m", "honed.cli.main", "serve", name, "--run-file", str(self._run_file))
        # Where cores are short, serving goes before learning: a push pauses people for as long as the engine waits for a core.
        return ProcessSpec(name, command, self._environment(), NICE.get(name, 0), ready_probe(section, READINESS[name]))

    def job(self, name: str) -> ProcessSpec:
        """A training job."""
        command = (sys.executable, "-m", "honed.cli.main", "job", name, "--run-file", str(self._run_file))
        return ProcessSpec(name, command, self._environment())

    def _environment(self) -> Mapping[str, str]:
        settings = self._settings
        # Threads that wait must not spin: on a small machine another process needs the core.
        variables = {
            name: os.environ.get(name, value) for name, value in (("HF_HUB_OFFLINE", "1"), ("OMP_WAIT_POLICY", "PASSIVE"))
        }
        variables |= secret_environment(settings)  # which the run file leaves out
        if self._redis_url is not None:
            variables["HONED_QUEUE__URL"] = self._redis_url
        return variables
