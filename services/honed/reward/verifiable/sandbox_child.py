"""The process that runs a response against tests: `python -I -S sandbox_child.py`, started by `sandbox` alone.

It reads one job from standard input, cuts itself off from the network and from other processes as
far as the kernel lets it, and forks. The child limits itself, runs the response and then the tests;
the parent waits for it, kills it and all that it has started, and writes one line of JSON: how many
checks passed of how many, or why the tests cannot be run.

Only the standard library's modules are imported, and everything that judges is prepared before the
response runs.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any

_REPORT_BYTES = 512
_POLL_S = (0.001, 0.02)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_NEW_USER, _NEW_PID, _NEW_NET, _NEW_IPC, _NEW_MOUNTS = 0x10000000, 0x20000000, 0x40000000, 0x08000000, 0x00020000
_MOUNT_FLAGS = 2 | 4  # no set-uid, no devices
_FILES = 64  # descriptors

_READABLE = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# Landlock (https://docs.kernel.org/userspace-api/landlock.html): system calls, and what may be done with files.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FIRST_RIGHTS, _REFER, _TRUNCATE, _IOCTL = (1 << 13) - 1, 1 << 13, 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL

_libc = ctypes.CDLL(None, use_errno=True)


def isolate(directory: str, disk_bytes: int) -> bool:
    """Leaves the namespaces of the network, processes and mounts behind; whether the kernel allowed it.

    The working directory becomes one in memory, of `disk_bytes` at most.
    """
    user, group = os.geteuid(), os.getegid()
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if _libc.unshare(_NEW_USER | _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_MOUNTS) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    options = f"size={disk_bytes},mode=0700".encode()
    if _libc.mount(b"tmpfs", directory.encode(), b"tmpfs", _MOUNT_FLAGS, options) == 0:
        os.chdir(directory)
    return True


def confine() -> bool:
    """Leaves of the file system the standard library to read and the working directory to use; whether the kernel can.

    Newer kernels also refuse TCP, and signals to processes outside.
    """
    version = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    rights = _FIRST_RIGHTS | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    rights |= _IOCTL if version >= 5 else 0
    handled = struct.pack("QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if rules < 0:
        return False
    library = [*sys.path, os.path.join(sys.base_prefix, "lib")]
    allowed = [(path, _READ_FILE | _READ_DIR | _EXECUTE) for path in (*library, *_READABLE)]
    allowed += [(path, _READ_FILE | _WRITE_FILE) for path in _DEVICES] + [(".", rights)]
    for path, wanted in allowed:
        with contextlib.suppress(OSError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            wanted &= rights if os.path.isdir(path) else rights & _OF_FILES
            _libc.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", wanted, place), 0)
            os.close(place)
    confined = bool(_libc.syscall(_RESTRICT_SELF, rules, 0) == 0)
    os.close(rules)
    return confined


def limit(seconds: int, memory_bytes: int, disk_bytes: int) -> None:
    """Bounds what this process may use: CPU seconds, address space, a file's size, descriptors; no processes, no core dump."""
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, disk_bytes),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def prepare(tests: str) -> list[tuple[bool, Any]]:
    """The top-level statements of the tests as code, each with whether it is a check, and then a call of each function `test*`.

    Raises:
        ValueError: They are not Python, or there is no check among them.
    """
    steps: list[tuple[bool, Any]] = []
    calls: list[ast.stmt] = []
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Pass)
    for statement in ast.parse(tests, "reference").body:
        told = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        checks = not told and not isinstance(statement, (*quiet, ast.AsyncFunctionDef))
        steps.append((checks, compile(ast.Module([statement], []), "reference", "exec")))
        if isinstance(statement, ast.FunctionDef) and statement.name.startswith("test") and not statement.args.args:
            calls += ast.parse(f"{statement.name}()").body
    steps += [(True, compile(ast.Module([call], []), "reference", "exec")) for call in calls]
    if not any(checks for checks, _ in steps):
        raise ValueError("there is no assert, call or function test* in it")
    return steps


def judge(program: str, steps: list[tuple[bool, Any]], stop_at_first: bool) -> tuple[int, int]:
    """Runs a program and the steps after it in one module; how many checks passed, of how many.

    A step that is no check and fails is one check more, that failed.
    """
    total = sum(checks for checks, _ in steps)
    module = types.ModuleType("response")
    sys.modules["response"] = module
    run = exec
    try:
        run(compile(program, "response", "exec"), module.__dict__)
    except BaseException:  # whatever it is, SystemExit included, the program does not work
        return 0, total
    passed = 0
    for checks, code in steps:
        try:
            run(code, module.__dict__)
            passed += checks
        except BaseException:
            total += not checks
            if stop_at_first:
                break
    return passed, total


def run_job(job: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Prepares the tests, runs the response and the tests, and reports."""
    confined = confine()
    limit(job["seconds"], job["memory_bytes"], job["disk_bytes"])
    try:
        steps = prepare(job["tests"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        report({"refused": f"{type(error).__name__}: {error}"[:200]})
        return
    passed, total = judge(job["program"], steps, not job["partial"])
    report({"passed": passed, "total": total, "confined": confined})


def children() -> list[int]:
    """Processes whose parent is this one: those that it forked, and those that its descendants left behind."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


def end_all(deadline: float) -> None:
    """Kills every process that is left below this one."""
    while time.monotonic() < deadline:
        for pid in children():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(_POLL_S[0])


def wait_for(child: int, timeout_s: float) -> None:
    """Waits until a child ends, or kills it when the time is over."""
    deadline, pause = time.monotonic() + timeout_s, _POLL_S[0]
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(pause)
        pause = min(_POLL_S[1], 1.5 * pause)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main() -> None:
    """Runs the job of standard input."""
    job = json.load(sys.stdin.buffer)
    out = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    isolated = isolate(job["directory"], job["disk_bytes"])
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for descriptor in (out, readable):
            os.close(descriptor)
        nonce = job.pop("nonce")

        def report(found: dict[str, Any], write: Any = os.write, dumps: Any = json.dumps) -> None:
            write(writable, f"{nonce}{dumps(found)}".encode())

        try:
            run_job(job, report)
        finally:
            os._exit(0)
    os.close(writable)
    os.set_blocking(readable, False)
    wait_for(child, job["timeout_s"])
    said = b""
    with contextlib.suppress(BlockingIOError):
        said = os.read(readable, _REPORT_BYTES)
    end_all(time.monotonic() + 1.0)
    nonce = job["nonce"].encode()
    found: Any = {}
    if said.startswith(nonce):
        with contextlib.suppress(ValueError):
            found = json.loads(said[len(nonce) :])
    os.write(out, json.dumps({**found, "isolated": isolated}).encode())


if __name__ == "__main__":
    main()
