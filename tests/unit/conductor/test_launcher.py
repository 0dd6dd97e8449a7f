"""Claims about the launcher of one machine, over small child processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.run import kill, process, until

from honed.conductor import local_launcher as module
from honed.conductor.launcher import ProcessSpec
from honed.conductor.local_launcher import Limits, ProcessLauncher
from honed.kit.errors import DeadlineExceeded, FailedPrecondition, HonedError, Unavailable

SLEEP = "import time; time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def spec(name: str, program: str, **more: object) -> ProcessSpec:
    return ProcessSpec(name, (sys.executable, "-c", program), **{"stop_s": 1.0, **more})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "PROBE_EVERY_S", 0.02)
    monkeypatch.setattr(module, "PROBE_DEADLINE_S", 0.2)
    monkeypatch.setattr(module, "ROTATE_EVERY_S", 0.05)


@pytest.fixture
async def launcher(tmp_path: Path) -> AsyncIterator[ProcessLauncher]:
    launcher = ProcessLauncher(tmp_path, Limits(restarts=2, window_s=600, log_bytes=1000))
    yield launcher
    await launcher.stop()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that init has yet to collect does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_a_service_that_dies_is_started_again(launcher: ProcessLauncher) -> None:
    await launcher.start(spec("one", SLEEP), 30)
    first = process(launcher, "one").pid
    await kill(launcher, "one", 30)
    state = process(launcher, "one")
    assert (state.restarts, state.last_exit) == (1, "killed by SIGKILL")
    assert state.pid not in (None, first)


DIES = "import sys; print('the disk is full'); sys.exit(3)"


async def test_a_service_that_dies_too_often_is_an_alarm_with_the_end_of_its_log_and_is_started_again(
    launcher: ProcessLauncher,
) -> None:
    never = asyncio.Event()
    with pytest.raises(Unavailable, match=r"one died 3 times in 600 s, last: exit code 3") as raised:
        await launcher.start(spec("one", DIES, ready=never.wait), 30)
    assert "the disk is full" in str(raised.value)
    await until(lambda: process(launcher, "one").restarts > 5, 60, "it is started for ever")


async def test_a_repeated_start_waits_for_the_first_one_and_starts_nothing(launcher: ProcessLauncher) -> None:
    ready = asyncio.Event()

    async def wait() -> None:
        await ready.wait()

    late = spec("one", SLEEP, ready=wait)
    with pytest.raises(DeadlineExceeded, match="not ready within"):
        await launcher.start(late, 0.3)
    pid = process(launcher, "one").pid
    assert process(launcher, "one").alarm == "one was not ready within 0.3 s"
    ready.set()
    await until(lambda: process(launcher, "one").ready, 60, "it comes")
    await launcher.start(late, 30)
    state = process(launcher, "one")
    assert (state.pid, state.restarts, state.alarm) == (pid, 0, "")


async def test_old_restarts_are_forgotten(tmp_path: Path) -> None:
    launcher = ProcessLauncher(tmp_path, Limits(restarts=2, window_s=0.001))
    starting = asyncio.ensure_future(launcher.start(spec("one", DIES, ready=asyncio.Event().wait), 30))
    await until(lambda: launcher.states() and process(launcher, "one").restarts > 5, 60, "six deaths, each in its own window")
    assert not process(launcher, "one").alarm
    starting.cancel()
    await launcher.stop()


async def test_a_service_that_cannot_be_started_at_all_is_an_alarm(launcher: ProcessLauncher, tmp_path: Path) -> None:
    (tmp_path / "one.log").mkdir()
    with pytest.raises(Unavailable, match="one died 3 times in 600 s, last: cannot be started: IsADirectoryError"):
        await launcher.start(spec("one", SLEEP), 30)


async def test_a_service_that_hangs_is_killed_and_started_again(launcher: ProcessLauncher) -> None:
    answers = asyncio.Event()
    answers.set()

    async def alive() -> None:
        if not answers.is_set():
            await asyncio.Event().wait()

    await launcher.start(spec("one", SLEEP, alive=alive), 30)
    first = process(launcher, "one").pid
    await asyncio.sleep(0.1)
    answers.clear()
    await until(lambda: process(launcher, "one").restarts == 1, 60, "it is started again")
    answers.set()
    await until(lambda: process(launcher, "one").pid not in (None, first), 60, "it runs")
    assert process(launcher, "one").last_exit == "hung; killed"


async def test_a_service_that_still_loads_is_not_taken_for_hung(launcher: ProcessLauncher) -> None:
    asked = 0

    async def alive() -> None:
        nonlocal asked
        asked += 1
        raise ConnectionError("the port is not open yet")

    await launcher.start(spec("one", SLEEP, alive=alive), 30)
    await until(lambda: asked > 6, 60, "many probes without an answer")
    assert process(launcher, "one").restarts == 0


def behind(pid: int) -> tuple[int, int]:
    """How far a process stands behind this one: among processes, and among sessions where the kernel groups them."""
    nice, own = os.getpriority(os.PRIO_PROCESS, pid), os.getpriority(os.PRIO_PROCESS, 0)
    try:
        session = int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])
    except OSError:
        session = nice
    return nice - own, session - own


async def test_a_service_stands_back_among_processes_and_among_sessions(launcher: ProcessLauncher) -> None:
    await launcher.start(spec("one", SLEEP, nice=5), 30)
    pid = process(launcher, "one").pid
    assert pid is not None
    await until(lambda: behind(pid) == (5, 5), 60, "it stands back")


async def test_a_newcomer_stands_back_until_it_is_ready(launcher: ProcessLauncher) -> None:
    ready = asyncio.Event()

    async def wait() -> None:
        await ready.wait()

    starting = asyncio.ensure_future(launcher.start(spec("one", SLEEP, ready=wait, starting_nice=5), 30))
    pid = await until(lambda: launcher.states() and process(launcher, "one").pid, 60, "it runs")
    await until(lambda: behind(pid) == (5, 5), 60, "it stands back")
    ready.set()
    await starting
    among_processes, among_sessions = behind(pid)
    if Path(f"/proc/{pid}/autogroup").exists():
        assert among_sessions == 0, "which takes no privilege"
    if os.geteuid() == 0:
        assert among_processes == 0


async def test_one_service_is_ended_and_forgotten(launcher: ProcessLauncher) -> None:
    for name in ("one-0", "one-1"):
        await launcher.start(spec(name, SLEEP), 30)
    pid = process(launcher, "one-1").pid
    await launcher.end("one-1")
    await launcher.end("one-2")
    assert [state.name for state in launcher.states()] == ["one-0"]
    assert pid is not None
    assert not alive(pid)


async def test_a_log_is_rotated_while_the_service_writes(launcher: ProcessLauncher, tmp_path: Path) -> None:
    await launcher.start(spec("one", "import time\nwhile True: print('x' * 99, flush=True); time.sleep(0.005)"), 30)
    await until(lambda: (tmp_path / "one.log.1").exists(), 60, "the log is rotated")
    await until(lambda: (tmp_path / "one.log").stat().st_size > 0, 60, "it goes on")
    assert (tmp_path / "one.log.1").stat().st_size > 1000


async def test_a_service_is_ready_when_it_says_so_and_no_sooner(launcher: ProcessLauncher) -> None:
    ready = asyncio.Event()

    async def wait() -> None:
        await ready.wait()

    starting = asyncio.ensure_future(launcher.start(spec("one", SLEEP, ready=wait), 30))
    await until(lambda: launcher.states() and process(launcher, "one").pid, 60, "it runs")
    assert not starting.done()
    assert not process(launcher, "one").ready
    ready.set()
    await starting
    assert process(launcher, "one").ready


async def test_a_service_that_is_not_ready_in_time_is_named(launcher: ProcessLauncher) -> None:
    with pytest.raises(DeadlineExceeded, match=r"one was not ready within 0\.5 s; the end of .*one\.log:"):
        await launcher.start(spec("one", SLEEP, ready=asyncio.Event().wait), 0.5)


async def test_a_stop_ends_children_of_children_too(launcher: ProcessLauncher, tmp_path: Path) -> None:
    await launcher.start(spec("parent", PARENT), 30)
    text = await until(lambda: (tmp_path / "parent.log").read_text().strip(), 60, "the parent tells its child's pid")
    grandchild, child = int(text), process(launcher, "parent").pid
    assert alive(grandchild)
    await launcher.stop()
    assert child is not None
    await until(lambda: not alive(child) and not alive(grandchild), 60, "both are gone")


async def test_a_killed_service_leaves_no_children_behind(launcher: ProcessLauncher, tmp_path: Path) -> None:
    await launcher.start(spec("parent", PARENT), 30)
    text = await until(lambda: (tmp_path / "parent.log").read_text().strip(), 60, "the parent tells its child's pid")
    await kill(launcher, "parent", 30)
    await until(lambda: not alive(int(text)), 60, "the first one's child is gone")


async def test_who_ignores_the_polite_signal_is_killed(launcher: ProcessLauncher, tmp_path: Path) -> None:
    await launcher.start(spec("one", STUBBORN), 30)
    await until(lambda: "up" in (tmp_path / "one.log").read_text(), 60, "it runs")
    pid = process(launcher, "one").pid
    assert pid is not None
    async with asyncio.timeout(20):
        await launcher.stop()
    assert not alive(pid)


async def test_a_job_runs_to_its_end(launcher: ProcessLauncher, tmp_path: Path) -> None:
    await launcher.run_job(spec("job", "print('done')"), 30)
    assert (tmp_path / "job.log").read_text() == "done\n"
    assert launcher.states() == [], "what ended well is no process any more"


async def test_a_failed_job_shows_the_end_of_its_log(launcher: ProcessLauncher) -> None:
    with pytest.raises(FailedPrecondition, match=r"job failed \(exit code 1\)") as raised:
        await launcher.run_job(spec("job", "raise SystemExit('honed: texts.jsonl is empty')"), 30)
    assert "honed: texts.jsonl is empty" in str(raised.value)
    assert process(launcher, "job").last_exit == "exit code 1"


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", Unavailable),
        ("import os, sys; sys.exit(os.EX_TEMPFAIL)", Unavailable),
        ("raise SystemExit(2)", FailedPrecondition),
    ],
)
async def test_a_job_that_was_killed_or_lacked_something_may_pass_and_one_that_failed_by_itself_may_not(
    launcher: ProcessLauncher, program: str, kind: type[HonedError]
) -> None:
    with pytest.raises(kind, match="job failed"):
        await launcher.run_job(spec("job", program), 30)


async def test_a_job_that_takes_too_long_is_ended(launcher: ProcessLauncher) -> None:
    with pytest.raises(DeadlineExceeded, match=r"job did not end within 0\.5 s"):
        await launcher.run_job(spec("job", SLEEP), 0.5)
    assert process(launcher, "job").pid is None


async def test_a_child_does_not_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from pathlib import Path
from honed.conductor.launcher import ProcessSpec
from honed.conductor.local_launcher import Limits, ProcessLauncher
async def main():
    launcher = ProcessLauncher(Path({str(tmp_path)!r}), Limits(1))
    await launcher.start(ProcessSpec("one", (sys.executable, "-c", "import time; time.sleep(600)")), 30)
    print(launcher.states()[0].pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    supervisor = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert supervisor.stdout is not None
    async with asyncio.timeout(60):
        pid = int(await supervisor.stdout.readline())
        assert alive(pid)
        os.kill(supervisor.pid, signal.SIGKILL)
        await supervisor.wait()
    await until(lambda: not alive(pid), 60, "the child is gone")
    supervisor._transport.close()  # type: ignore[attr-defined]
