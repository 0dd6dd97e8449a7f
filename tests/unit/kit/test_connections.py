"""The record of connections: whole, once each, and never in the way."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tests.support.run import SERVICES, environment

from honed.kit.connections import VARIABLE
from honed.settings_file import load_settings


def recorded(file: Path, program: str, **variables: str) -> list[dict[str, str | int]]:
    """Runs a program in a process of its own, since an audit hook stays; the lines of its record."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment(**{VARIABLE: str(file)}, **variables),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_sockets_and_channels_are_recorded_once_each_and_unix_sockets_never(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        rows = recorded(
            tmp_path / "record",
            """
            import asyncio, os, socket
            from honed.kit import connections
            from honed.kit.channel import connect

            port = int(os.environ["PORT"])
            socket.create_connection(("127.0.0.1", port)).close()  # not yet
            connections.record("learner")
            for _ in range(3):
                socket.create_connection(("127.0.0.1", port)).close()
            ours, theirs = socket.socketpair()
            with socket.socket(socket.AF_UNIX) as local:
                local.connect_ex("nobody")

            async def main():
                connect("127.0.0.1:1")  # without a call it connects to nobody
                for target in ("dns:///elsewhere:50051", "ipv4:10.0.0.1:2,10.0.0.2:3", "unix:nobody"):
                    async with connect(target) as channel:
                        method = channel.unary_unary("/a/B", lambda _: b"", lambda _: b"")
                        try:
                            await method(None, timeout=0.01)
                        except Exception:
                            pass

            asyncio.run(main())
            connections.listening(50051, "honed.v1.LearnerService")
            """,
            PORT=str(port),
        )
    assert rows == [
        {"from": "learner", "to": "127.0.0.1", "port": port},
        {"from": "learner", "to": "elsewhere", "port": 50051},
        {"from": "learner", "to": "10.0.0.1", "port": 2},
        {"from": "learner", "to": "10.0.0.2", "port": 3},
        {"listener": "learner", "serves": "honed.v1.LearnerService", "port": 50051},
    ]


def test_processes_that_share_a_file_write_whole_lines(tmp_path: Path) -> None:
    rows = recorded(
        tmp_path / "record",
        """
        import os
        from honed.kit import connections

        connections.record("learner")
        children = []
        for child in range(4):
            if not (pid := os.fork()):
                for number in range(200):
                    connections.calling(f"host-{child}:{number}")
                os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
        """,
    )
    assert {(row["to"], row["port"]) for row in rows} == {(f"host-{c}", n) for c in range(4) for n in range(200)}
    assert len(rows) == 800


def test_a_record_that_cannot_be_written_fails_no_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        rows = recorded(
            tmp_path / "missing" / "record",
            """
            import os, socket
            from honed.kit import connections

            connections.record("learner")
            socket.create_connection(("127.0.0.1", int(os.environ["PORT"]))).close()
            connections.calling("reward:50051")
            connections.calling("what is this")
            """,
            PORT=str(server.getsockname()[1]),
        )
    assert rows == []


def test_without_the_variable_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    from honed.kit import connections

    connections.record("learner", {})
    connections.calling("reward:50051")
    assert os.listdir(tmp_path) == []
    assert connections._record is None


def test_the_variable_is_taken_for_no_setting(tmp_path: Path) -> None:
    assert load_settings(None, {VARIABLE: str(tmp_path / "record")}) == load_settings(None, {})


def test_whoever_opens_a_grpc_connection_says_so() -> None:
    """gRPC's own connections are seen by no audit hook."""
    opens = re.compile(r"\b(?:in)?secure_channel\(|\bOTLPSpanExporter\(")
    silent = {
        path.relative_to(SERVICES / "honed").as_posix()
        for path in (SERVICES / "honed").rglob("*.py")
        if opens.search(text := path.read_text()) and "connections.calling(" not in text
    }
    assert silent == {
        "_client/peer.py",  # applications, people and the command line: no component of a run
        "conductor/probes.py",  # health ports of its own child processes; in a cluster the kubelet asks
    }
