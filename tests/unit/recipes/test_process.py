"""A task as a process of its own: what it leaves, and what is said when it fails or takes too long."""

import re

import pytest

from honed.kit.errors import DataLoss, DeadlineExceeded, FailedPrecondition
from honed.recipes.bench import process
from honed.recipes.bench.process import ProcessRunner, origin
from honed.recipes.bench.results import Task
from honed.recipes.catalogue import Recipe

NOSUCH = Task(Recipe("ppo2", "# No recipe of the package\n"), 3)


def runner(tmp_path, limit_s=120.0):
    return ProcessRunner(tmp_path / "runs", tmp_path / "reuse", limit_s)


def test_a_run_that_fails_is_told_with_its_last_words(tmp_path):
    with pytest.raises(
        FailedPrecondition, match=r"ended with status 1: honed: there is no recipe 'ppo2'; .*; see .*ppo2-3\.log"
    ):
        runner(tmp_path)(NOSUCH)
    assert "there is no recipe" in (tmp_path / "runs" / "ppo2-3.log").read_text()


def test_a_run_that_takes_too_long_is_stopped(tmp_path):
    with pytest.raises(DeadlineExceeded, match=r"stopped after 0\.05 s"):
        runner(tmp_path, limit_s=0.05)(NOSUCH)


@pytest.mark.parametrize("figures", [None, "{", "{}"])
def test_a_run_without_figures_has_failed(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(process.sys, "executable", "/bin/true")  # a run that ends well and does nothing
    if figures is not None:
        (tmp_path / "runs" / NOSUCH.label).mkdir(parents=True)
        (tmp_path / "runs" / NOSUCH.label / "recipe.json").write_text(figures)
    with pytest.raises(DataLoss, match=r"recipe\.json has no figures"):
        runner(tmp_path)(NOSUCH)


def test_results_say_what_code_and_what_machine_they_are_of():
    found = origin()
    assert re.fullmatch(r"[0-9a-f]{9}\+?|release .+", found.commit)
    assert re.fullmatch(r"\d+ cores, \w+", found.machine)
