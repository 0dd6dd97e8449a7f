"""Addresses of a run on this machine: free ports for its services, and the file that tells clients where they are."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from honed.config import RunSettings
from honed.kit.address import is_ip, join, resolved
from honed.kit.errors import FailedPrecondition
from honed.settings import ReplicatedSettings, ServerSettings, TlsSettings
from honed.topology import SERVICES
from honed.workspace import Workspace

_PORTS = ("port", "control_port", "health_port", "metrics_port")


def with_ports(settings: RunSettings) -> RunSettings:
    """The settings with every port 0 of a service replaced by a free one. The ports stay the same when a service restarts."""
    tree: dict[str, Any] = {}
    with _free_ports() as free:
        for name in type(settings).model_fields:
            section = getattr(settings, name)
            if isinstance(section, ServerSettings):
                chosen = {p: free(section.host) for p in _PORTS if getattr(section, p, None) == 0}
                tree[name] = section.model_copy(update=chosen)
        queue = settings.queue
        if queue.url is None and queue.port == 0:
            tree["queue"] = queue.model_copy(update={"port": free("127.0.0.1")})
    return settings.model_copy(update=tree)


def replica_section(section: ReplicatedSettings, replica: int) -> ReplicatedSettings:
    """A replica's own settings. The first one has the ports of the section, each other one free ports of its own."""
    if replica == 0:
        ports: dict[str, int] = {}
        address = section.address
    else:
        with _free_ports() as free:
            ports = {name: free(section.host) for name in _PORTS if hasattr(section, name)}
        address = None
    return section.model_copy(update={"replica": replica, "address": address, **ports})


def joint_target(service: str, sections: Sequence[ReplicatedSettings], tls: TlsSettings | None = None) -> str:
    """One gRPC target for all replicas of a service, over which a channel spreads its calls.

    Raises:
        FailedPrecondition: their addresses cannot be joined; says what to set.
    """
    if len(sections) == 1:
        return sections[0].target
    host, number = sections[0].host, len(sections)
    if sections[0].address is not None:
        raise FailedPrecondition(
            f"{service}.address is {sections[0].address}, which is one address for {number} processes: "
            f"leave it out, so that each has {service}.host and a port of its own, or run one"
        )
    if tls is not None and not tls.server_name and not is_ip(host):
        raise FailedPrecondition(
            f"{service}.host is {host}, but the {number} processes are called by IP address: set "
            "security.tls.server_name to a name that their certificates carry"
        )
    try:
        return join([(section.host, section.port) for section in sections])
    except (OSError, ValueError) as error:
        raise FailedPrecondition(f"{service}.host {host} cannot be the host of {number} processes: {error}") from error


def write_endpoints(settings: RunSettings, targets: Mapping[str, str]) -> None:
    """Says in `endpoints.json` where the services are; `targets` are of those that run as several processes."""
    workspace = Workspace(settings.directory)
    endpoints: dict[str, object] = {name: targets.get(name) or getattr(settings, name).target for name in SERVICES}
    if settings.security.authentication:
        endpoints["token_file"] = os.path.relpath(settings.tokens_directory / "application.token", workspace.root)
    if settings.security.tls is not None:
        endpoints["tls"] = settings.security.tls.model_dump(mode="json")
    partial = workspace.endpoints.with_suffix(".partial")
    partial.write_text(json.dumps(endpoints, indent=2) + "\n")
    partial.replace(workspace.endpoints)


@contextmanager
def _free_ports() -> Iterator[Any]:
    """Yields a function from a host to a free port; none is chosen twice, since each stays held until all are chosen."""
    taken: list[socket.socket] = []

    def free(host: str) -> int:
        family, address = resolved(host)
        probe = socket.socket(family)
        taken.append(probe)
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port

    try:
        yield free
    finally:
        for probe in taken:
            probe.close()
