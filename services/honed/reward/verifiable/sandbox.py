"""Runs Python code against tests in a process of its own, locked down as far as the kernel allows.

What the child has: a session and process group of its own, `python -I -S` (the standard library and
nothing that is installed), an empty environment, an empty working directory that is removed,
standard input and output that lead nowhere, limits on CPU seconds, address space, file size and
descriptors, no core dump, and a time after which it and everything that it started is killed.

Where the kernel lets an ordinary user make namespaces, it also has no network, sees no other
processes, cannot leave one behind, and its working directory is in memory and bounded.
`Outcome.isolated` says whether this was so.

Where the kernel has Landlock (5.13), it can read the standard library and the system's shared
libraries, write in its working directory, and open no other file; since 6.7 it has no TCP either,
and since 6.12 it can signal no other process. `Outcome.confined` says whether there is Landlock.

What this does not cover:

- Without Landlock the code reads every file that the service's user can read, tokens and models
  included, and writes where that user may write.
- The response and the tests run in one interpreter. Code that sets out to deceive can walk through
  frames to the tests and to the report, or answer with objects that are equal to everything. It
  cannot pass by printing or by ending the process.
- There is no filter of system calls: a hole in the kernel is a hole here.
- RLIMIT_NPROC does not hold for root: where the service runs as root a response can fork until its
  time is over.
- Without namespaces a process that kills its parent can leave others behind, and the working
  directory has no bound but the disk's.
- CPU and memory bandwidth are shared: responses can slow down each other, and the service.

So give the reward service a user of its own that can read little, and a container; or score by
tests on a machine that has nothing to lose.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CHILD: Final = Path(__file__).with_name("sandbox_child.py")
GRACE_S: Final = 3.0
"""For the start and the end of the child beside the time of the code."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the code may use.

    Attributes:
        timeout_s: Wall-clock seconds; as many CPU seconds, rounded up.
        memory_mb: Address space.
        disk_mb: A file's size, and the working directory's where it is in memory.
    """

    timeout_s: float = 5.0
    memory_mb: int = 512
    disk_mb: int = 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        passed: Checks that passed.
        total: Checks; 0 when nothing was reported: the code ended the process, was killed, or took
            too long.
        refused: Why the tests cannot be run; empty if they can.
        isolated: Whether namespaces kept it from the network and from other processes.
        confined: Whether Landlock kept it from files; known only when checks were reported.
    """

    passed: int = 0
    total: int = 0
    refused: str = ""
    isolated: bool = False
    confined: bool = False


def run_tests(program: str, tests: str, limits: Limits, *, partial: bool = False) -> Outcome:
    """Runs a program and then tests. Blocks for `limits.timeout_s` and a few seconds at most.

    Args:
        program: Python source that nobody has looked at.
        tests: Python source; each top-level statement that does something is a check, and each
            function `test*` is one.
        limits: What it may use.
        partial: Go on after a check that failed.

    Raises:
        OSError: No process could be started.
    """
    with tempfile.TemporaryDirectory(prefix="honed-tests-", ignore_cleanup_errors=True) as directory:
        job = {
            "program": program,
            "tests": tests,
            "partial": partial,
            "nonce": secrets.token_hex(16),
            "directory": directory,
            "timeout_s": limits.timeout_s,
            "seconds": math.ceil(limits.timeout_s),
            "memory_bytes": limits.memory_mb << 20,
            "disk_bytes": limits.disk_mb << 20,
        }
        return _read(_run(json.dumps(job).encode(), directory, limits.timeout_s + GRACE_S))


def _run(job: bytes, directory: str, timeout_s: float) -> bytes:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=directory,
        env={},
        start_new_session=True,
    )
    with process:
        try:
            said, _ = process.communicate(job, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
    return said


def _read(said: bytes) -> Outcome:
    try:
        found = json.loads(said)
        passed, total = int(found.get("passed", 0)), int(found.get("total", 0))
        refused, confined = str(found.get("refused", "")), bool(found.get("confined"))
        return Outcome(max(0, min(passed, total)), max(0, total), refused, bool(found["isolated"]), confined)
    except (ValueError, TypeError, KeyError, AttributeError):
        return Outcome()
