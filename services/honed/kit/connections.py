"""Records whom this process connects to, so that NetworkPolicies can be held against it.

Off, unless HONED_RECORD_CONNECTIONS names a file, which all processes of a run may share. Each distinct connection and each
port is one line of JSON there:

    {"from": "learner", "to": "10.0.0.7", "port": 50052}
    {"listener": "generation", "serves": "honed.v1.GenerationControlService", "port": 50052}

Python's own sockets (Redis, databases, object stores, Kubernetes' API) are seen as they connect, by an audit hook. gRPC opens
its connections where Python does not see them: its channels name whom they call (`calling`). What other native libraries open
is not seen, and a Unix socket never leaves its pod. A record that cannot be written costs a line in the log and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

logger = logging.getLogger(__name__)

VARIABLE: Final = "HONED_RECORD_CONNECTIONS"
_TARGET: Final = re.compile(r"(?:dns:(?://[^/]*/)?|ipv[46]:)?(?P<addresses>[^/]+)")


class _Record:
    """The file, and what this process has written to it."""

    def __init__(self, file: str, component: str) -> None:
        self._file, self.component = file, component
        self._seen: set[str] = set()

    def add(self, line: Mapping[str, str | int]) -> None:
        text = json.dumps(line)
        if text in self._seen:
            return
        self._seen.add(text)
        try:
            handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(handle, f"{text}\n".encode())  # a line at once: other processes append as well
            finally:
                os.close(handle)
        except OSError as error:
            logger.warning("a connection cannot be recorded", extra={"file": self._file, "reason": str(error)})


_record: _Record | None = None


def record(component: str, environment: Mapping[str, str] = os.environ) -> None:
    """Records what this process opens from now on, if the environment says where to.

    Args:
        component: what this process is.
        environment: may hold `VARIABLE`.
    """
    global _record
    file = environment.get(VARIABLE)
    if not file:
        return
    if _record is None:
        sys.addaudithook(_hear)  # for good: a hook cannot be taken away
    _record = _Record(file, component)


def calling(target: str) -> None:
    """Says that a gRPC channel makes a call; `target` is its target, of which each address may be connected to."""
    if _record is not None:
        for host, port in _addresses(target):
            _record.add({"from": _record.component, "to": host, "port": port})


def listening(port: int, serves: str) -> None:
    """Says that this process listens on a port; `serves` names what for."""
    if _record is not None:
        _record.add({"listener": _record.component, "serves": serves, "port": port})


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "socket.connect" or _record is None:
        return
    with contextlib.suppress(Exception):  # what a hook raises would become an error of the connection
        connecting, address = arguments
        if connecting.family in (socket.AF_INET, socket.AF_INET6) and connecting.type == socket.SOCK_STREAM:
            _record.add({"from": _record.component, "to": str(address[0]), "port": int(address[1])})


def _addresses(target: str) -> Iterator[tuple[str, int]]:
    """Host and port of each address in a gRPC target; none of a Unix socket."""
    match = _TARGET.fullmatch(target)
    for address in match["addresses"].split(",") if match else ():
        host, _, port = address.rpartition(":")
        if host and port.isdecimal():
            yield host.strip("[]"), int(port)
