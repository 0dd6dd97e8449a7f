"""Addresses of a run on this machine: free ports for its services, and the file that tells clients where they are."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from honed.config import RunSettings
from honed.settings import ReplicatedSettings, ServerSettings
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


def joint_target(sections: list[ReplicatedSettings]) -> str:
    """One gRPC target for all replicas, over which a channel spreads its calls."""
    targets = [section.target for section in sections]
    if len(targets) == 1:
        return targets[0]
    hosts = {section.host: _as_ip(section.host) for section in sections}
    family = "ipv6" if any(":" in host for host in hosts.values()) else "ipv4"
    return f"{family}:" + ",".join(f"{hosts[section.host]}:{section.port}" for section in sections)


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


def _as_ip(host: str) -> str:
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.strip("[]"))
        return f"[{address}]" if address.version == 6 else str(address)
    return str(socket.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)[0][4][0])


@contextmanager
def _free_ports() -> Iterator[Any]:
    """Yields a function from a host to a free port; none is chosen twice, since each stays held until all are chosen."""
    taken: list[socket.socket] = []

    def free(host: str) -> int:
        probe = socket.socket()
        taken.append(probe)
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port

    try:
        yield free
    finally:
        for probe in taken:
            probe.close()
