"""Claims about the cores that the learner has to itself on one machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.run import process, run_tree, settings_of, until

from honed.check.findings import Report
from honed.check.machine import check_machine
from honed.conductor.cores import cores_beside
from honed.conductor.launcher import ProcessSpec
from honed.conductor.local import local_run
from honed.conductor.local_launcher import Limits, ProcessLauncher
from honed.conductor.processes import Processes
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition
from honed.learner.build import build_trainer

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")
PARENT = (sys.executable, "-c", f"import subprocess; subprocess.run({list(SLEEP)!r})")
TALKER = (sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)")

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds processes to cores")


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of eight cores without a quota."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("honed.conductor.cores.granted_cores", lambda: 8)


@pytest.mark.usefixtures("eight")
def test_whole_physical_cores_go_to_the_learner(tmp_path: Path) -> None:
    for number, siblings in enumerate(("0,4", "1,5", "2-3", "2-3", "0,4", "1,5", "6", "")):
        (tmp_path / f"cpu{number}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{number}" / "topology" / "thread_siblings_list").write_text(siblings)

    assert cores_beside(1, tmp_path) == (0, 1, 2, 3, 4, 5, 6)
    assert cores_beside(4, tmp_path) == (0, 1, 4, 5), "2 and 3 are one, 6 and 7 have no siblings"
    assert cores_beside(6, tmp_path) == (0, 4)


@pytest.mark.usefixtures("eight")
def test_without_the_kernels_directory_a_number_is_a_core(tmp_path: Path) -> None:
    assert cores_beside(7, tmp_path / "none") == (0,)
    assert cores_beside(None, tmp_path / "none") == ()


@pytest.mark.parametrize(("granted", "own"), [(1, 1), (2, 2), (2, 64)])
def test_one_core_is_left_for_the_rest(monkeypatch: pytest.MonkeyPatch, granted: int, own: int) -> None:
    monkeypatch.setattr("honed.conductor.cores.granted_cores", lambda: granted)
    with pytest.raises(FailedPrecondition, match=f"learner.own_cores: is {own}, and there are {granted} in all.*take fewer"):
        cores_beside(own)


def test_a_system_that_binds_nothing_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_setaffinity")
    assert cores_beside(None) == ()
    with pytest.raises(FailedPrecondition, match="only Linux can: leave it out"):
        cores_beside(1)


async def test_what_does_not_train_is_bound_with_its_children(tmp_path: Path) -> None:
    everywhere = os.sched_getaffinity(0)
    one = min(everywhere)
    launcher = ProcessLauncher(tmp_path, Limits(restarts=2), shared_cores=(one,))
    try:
        await launcher.start(ProcessSpec("learner", SLEEP, trains=True, stop_s=1.0), 30)
        await launcher.start(ProcessSpec("other", PARENT, stop_s=1.0), 30)
        learner, other = process(launcher, "learner").pid, process(launcher, "other").pid
        assert learner is not None
        assert other is not None
        listed = Path(f"/proc/{other}/task/{other}/children")
        child = int(await until(lambda: listed.read_text().strip(), 60, "the other has a child"))
        assert (os.sched_getaffinity(other), os.sched_getaffinity(child)) == ({one}, {one})
        assert os.sched_getaffinity(learner) == everywhere
    finally:
        await launcher.stop()


async def test_a_core_that_is_gone_starts_the_service_on_any(tmp_path: Path) -> None:
    launcher = ProcessLauncher(tmp_path, Limits(restarts=2), shared_cores=(max(os.sched_getaffinity(0)) + 4096,))
    try:
        await launcher.start(ProcessSpec("one", TALKER, stop_s=1.0), 30)
        await until(lambda: (tmp_path / "one.log").read_text() == "up\n", 60, "it runs")
        assert os.sched_getaffinity(process(launcher, "one").pid or 0) == os.sched_getaffinity(0)
    finally:
        await launcher.stop()


def test_the_learner_and_the_jobs_train_and_nothing_else(tmp_path: Path) -> None:
    processes = Processes(RunSettings(), tmp_path / "run.yaml")
    redis = processes.redis()
    assert redis is not None
    assert not redis.trains
    assert [name for name in ("preference", "learner") if processes.service(name).trains] == ["learner"]
    assert processes.job("reward-model").trains
    assert not processes.replica("generation", RunSettings().generation).trains


def test_settings_that_contradict_it_are_refused(tmp_path: Path) -> None:
    tree: dict[str, Any] = run_tree(tmp_path)
    tree["learner"] = tree.get("learner", {}) | {"own_cores": 1, "threads": 2}
    with pytest.raises(ValueError, match=r"learner\.own_cores: 1, and learner\.threads: 2 would not fit"):
        settings_of(tree)
    del tree["learner"]["threads"]
    tree["conductor"] = tree.get("conductor", {}) | {"launcher": "none"}
    with pytest.raises(
        ValueError, match=r"learner\.own_cores: is for processes of one machine, and conductor\.launcher is none"
    ):
        settings_of(tree)


async def test_a_run_binds_what_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = min(os.sched_getaffinity(0))
    monkeypatch.setattr("honed.conductor.local.cores_beside", lambda own: (one,) if own == 1 else ())
    settings = RunSettings.model_validate({"directory": str(tmp_path / "run"), "learner": {"own_cores": 1}})
    made: list[ProcessLauncher] = []

    class Noted(ProcessLauncher):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            made.append(self)

    monkeypatch.setattr("honed.conductor.local.ProcessLauncher", Noted)
    async with local_run(settings):
        await made[0].start(ProcessSpec("any", SLEEP, stop_s=1.0), 30)
        await until(lambda: os.sched_getaffinity(process(made[0], "any").pid or 0) == {one}, 60, "it is bound")


@pytest.mark.parametrize(("own", "threads", "computing"), [(3, None, 3), (3, 2, 2), (None, 2, 2)])
def test_the_learner_has_a_thread_for_each_core_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int | None, threads: int | None, computing: int
) -> None:
    asked: list[int | None] = []
    monkeypatch.setattr("honed.learner.build.use_threads", lambda threads, *_: asked.append(threads))
    tree = run_tree(tmp_path)
    tree["learner"] = tree.get("learner", {}) | {"own_cores": own, "threads": threads, "device": "cpu"}
    build_trainer(settings_of(tree), Path(tree["conductor"]["start_from"]))
    assert asked == [computing]


async def test_too_many_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    settings = RunSettings.model_validate({"directory": str(tmp_path / "run"), "learner": {"own_cores": 100_000}})
    with pytest.raises(FailedPrecondition, match=r"learner\.own_cores: is 100000"):
        async with local_run(settings):
            pass
    assert not (tmp_path / "run").exists()


def test_the_check_says_so_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("honed.check.machine.cores_beside", lambda own: (0,) if own == 1 else cores_beside(own))
    monkeypatch.setattr("honed.check.machine.has_gpu", lambda: False)
    tree = run_tree(tmp_path)
    tree["learner"] = tree.get("learner", {}) | {"own_cores": 1}
    tree["generation"] = tree.get("generation", {}) | {"threads": 3}
    tight, many = Report(), Report()
    check_machine(settings_of(tree), tight, None)
    tree["learner"]["own_cores"] = 100_000
    check_machine(settings_of(tree), many, None)

    assert [finding.text.partition(":")[0] for finding in tight.findings] == [
        "leaves 1 of this machine's cores, and generation computes with 3 threads"
    ]
    assert [(f.severity, f.where) for f in many.findings] == [("error", "learner.own_cores")]
    assert many.findings[0].text.startswith("is 100000, and there are")
