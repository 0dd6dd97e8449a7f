"""What the processes of a run on this machine are: one specification a replica of a service, one a job."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from honed.conductor.launcher import STOP_S, ProcessSpec
from honed.conductor.probes import alive_probe, ready_probe
from honed.config import RunSettings
from honed.generation.settings import GenerationSettings
from honed.kit.address import host_port
from honed.queue.embedded import embedded_redis_command, embedded_redis_url, wait_ready
from honed.settings import ReplicatedSettings, ServerSettings
from honed.settings_file import secret_environment
from honed.topology import SERVICES
from honed.workspace import Workspace

_REPLICA_KEYS = ("replica", "port", "control_port", "health_port", "metrics_port")


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
        """A service of which one process runs."""
        return self._spec(name, name, getattr(self._settings, name), {})

    def replica(self, name: str, section: ReplicatedSettings) -> ProcessSpec:
        """One replica of a service, `NAME-0`, `NAME-1` and so on; `section` are its own settings."""
        values = {key: getattr(section, key) for key in _REPLICA_KEYS if hasattr(section, key)}
        values["address"] = section.target
        if isinstance(section, GenerationSettings) and section.replica:
            values["control_address"] = host_port(section.host, section.control_port)
        variables = {f"HONED_{name.upper()}__{key.upper()}": str(value) for key, value in values.items()}
        return self._spec(replica_name(name, section.replica), name, section, variables)

    def job(self, name: str, *arguments: str) -> ProcessSpec:
        """A training job."""
        command = (sys.executable, "-m", "honed.cli.main", "job", name, "--run-file", str(self._run_file), *arguments)
        return ProcessSpec(name, command, self._environment(), trains=True)

    def _spec(self, process: str, name: str, section: ServerSettings, variables: Mapping[str, str]) -> ProcessSpec:
        service = SERVICES[name]
        return ProcessSpec(
            process,
            (sys.executable, "-m", "honed.cli.main", "serve", name, "--run-file", str(self._run_file)),
            {**self._environment(), **variables},
            service.nice,
            ready_probe(section, service.grpc_name),
            alive_probe(section),
            # Calls in flight have `drain_s`, and so does the work behind them.
            stop_s=max(STOP_S, 2 * section.drain_s + 10) if name != "learner" else self._update_s(section),
            trains=name == "learner",
        )

    def _update_s(self, section: ServerSettings) -> float:
        """A stop lets the learner's update in hand finish, however long it takes; a second Ctrl-C does not wait."""
        return self._settings.learner.update_timeout_s + 2 * section.drain_s

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


def replica_name(service: str, replica: int) -> str:
    """What the process of a replica is called."""
    return f"{service}-{replica}"
