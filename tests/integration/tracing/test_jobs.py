"""The trace of a job that a SIGTERM ends: it goes out first, and the job ends all the same. Each is a real process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.collector import collecting
from tests.support.run import environment, run_tree, write_run_file

JOB = """
import sys, threading, types
from honed.learner import jobs

def train(settings):
    print("trains", flush=True)
    threading.Event().wait()

jobs.pretrain = sys.modules["honed.learner.jobs.pretrain"] = types.ModuleType("pretrain")
jobs.pretrain.run = train
from honed.cli.entry import main
main()
"""
FIRST = ("unshare", "--pid", "--fork", "--kill-child")
"""Makes what follows process 1 of a namespace of its own, as in a container."""


def has_namespaces() -> bool:
    try:
        return subprocess.run([*FIRST, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


namespaces = pytest.mark.skipif(not has_namespaces(), reason="unshare makes no namespace of pids here")


@contextmanager
def training(tmp_path: Path, endpoint: str, *prefix: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A job whose thread trains for ever, and the pid to signal."""
    run_file = write_run_file(tmp_path / "run.yaml", {**run_tree(tmp_path), "telemetry": {"otlp_endpoint": endpoint}})
    command = [*prefix, sys.executable, "-c", JOB, "job", "pretrain", "--run-file", str(run_file)]
    variables = environment(*map(Path, filter(None, sys.path)))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "trains\n"
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield process, int(children[0]) if prefix else process.pid
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("prefix", "status"),
    [
        pytest.param((), -signal.SIGTERM, id="a child"),
        pytest.param(FIRST, 128 + signal.SIGTERM, id="process 1", marks=namespaces),
    ],
)
def test_the_trace_of_a_job_that_is_stopped_arrives(prefix: tuple[str, ...], status: int, tmp_path: Path) -> None:
    with collecting() as collector, training(tmp_path, collector.endpoint, *prefix) as (process, pid):
        os.kill(pid, signal.SIGTERM)
        assert process.wait(20) == status
        job = collector.one("job pretrain")
    assert (job.failed, job.attributes["error.type"]) == (True, "cancelled")


def test_a_job_that_is_stopped_waits_for_no_collector_that_never_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with training(tmp_path, endpoint) as (process, pid):
            started = time.monotonic()
            os.kill(pid, signal.SIGTERM)
            assert process.wait(20) == -signal.SIGTERM
            assert time.monotonic() - started < 5.0
