"""The bench: what it runs, goes on from, tells and writes. Figures come from a function in place of a run of minutes."""

import json

import pytest
from typer.testing import CliRunner

from honed.cli.main import app
from honed.kit.errors import FailedPrecondition
from honed.recipes.bench.bench import Origin, run_bench, tasks
from honed.recipes.bench.page import write_page
from honed.recipes.bench.results import Results, Task
from honed.recipes.bench.table import BEGIN, END, markdown, rows, spread, write_between_markers
from honed.recipes.catalogue import Recipe
from honed.recipes.figures import RecipeFigures

DPO, RLOO = Recipe("dpo", "# DPO\nrun: dpo\n"), Recipe("rloo", "# RLOO\nrun: rloo\n")
ORIGIN = Origin("abc123", "2 cores, x86_64")


def figures(task, gain=1.0, **more):
    base = {
        "recipe": task.recipe.name, "seed": task.seed, "figure": "judge", "before": 0.25 * task.seed,
        "after": 0.25 * task.seed + gain, "others": {"ROUGE-L": [0.1, 0.2]}, "kl_nats": 5.0, "distinct2_ratio": None,
        "updates": 2, "examples": 10240, "versions_pushed": 2, "seconds": 100.0, "seconds_training": 60.0,
        "reused": {"pretrain": 190.0}, "curves": {"score_mean": [0.0, float(task.seed)]},
    }  # fmt: skip
    return RecipeFigures(**{**base, **more})


class Runs:
    """A runner that counts, and that fails for some tasks."""

    def __init__(self, failing=()):
        self.failing, self.ran = set(failing), []

    def __call__(self, task):
        self.ran.append(task.label)
        if task.label in self.failing:
            raise FailedPrecondition("it ended with status 1: no | space left")
        return figures(task)


def bench(wanted, directory, run):
    return list(run_bench(wanted, Results(directory), run, ORIGIN))


def results_of(wanted, directory):
    return [found for task in wanted if (found := Results(directory).of(task)) is not None]


def test_tasks_go_seed_by_seed_since_a_seeds_recipes_share_models():
    assert [task.label for task in tasks([DPO, RLOO], 2)] == ["dpo-1", "rloo-1", "dpo-2", "rloo-2"]


def test_a_recipe_with_something_else_in_it_has_results_and_a_row_of_its_own(tmp_path):
    plain, changed = tasks([DPO], 1), tasks([DPO], 1, changes=["learner.max_staleness=0"])
    run = Runs()
    bench([*plain, *changed], tmp_path, run)
    bench([*changed, *plain], tmp_path, run)
    assert len(run.ran) == len(set(run.ran)) == 2
    shown = rows(results_of([*plain, *changed], tmp_path))
    assert [row.cells()[0] for row in shown] == ["`dpo`", "`dpo learner.max_staleness=0`"]
    assert bench(tasks([DPO], 1, changes=["learner.max_staleness=1"]), tmp_path, run)


def test_what_is_done_is_not_run_again(tmp_path):
    wanted, run = tasks([DPO, RLOO], 2), Runs()
    bench(wanted[:3], tmp_path, run)
    told = bench(wanted, tmp_path, run)
    assert run.ran == ["dpo-1", "rloo-1", "dpo-2", "rloo-2"]
    assert [(each.task.label, each.number, each.of, each.result is None) for each in told] == [
        ("rloo-2", 1, 1, True),
        ("rloo-2", 1, 1, False),
    ]
    assert results_of(wanted, tmp_path)[0].figures == RecipeFigures.from_json(figures(wanted[0]).as_json())


def test_a_failure_is_told_ends_nothing_and_is_tried_again(tmp_path):
    wanted = tasks([DPO, RLOO], 1)
    bench(wanted, tmp_path, Runs(failing=["dpo-1"]))
    failed, fine = results_of(wanted, tmp_path)
    assert (failed.figures, failed.error) == (None, "it ended with status 1: no | space left")
    assert fine.figures is not None
    again = Runs()
    bench(wanted, tmp_path, again)
    assert again.ran == ["dpo-1"]
    assert results_of(wanted, tmp_path)[0].figures is not None


def test_an_interrupted_task_leaves_no_result(tmp_path):
    def interrupted(task):
        raise KeyboardInterrupt

    wanted = tasks([DPO], 1)
    with pytest.raises(KeyboardInterrupt):
        bench(wanted, tmp_path, interrupted)
    assert results_of(wanted, tmp_path) == []


def test_a_recipe_that_was_changed_is_run_again(tmp_path):
    run = Runs()
    bench(tasks([DPO], 1), tmp_path, run)
    bench(tasks([Recipe("dpo", DPO.text + "seed: 2\n")], 1), tmp_path, run)
    assert run.ran == ["dpo-1", "dpo-1"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"recipe": "dpo"}'])
def test_a_result_that_cannot_be_read_is_none(damage, tmp_path):
    [task] = wanted = tasks([DPO], 1)
    bench(wanted, tmp_path, Runs())
    (tmp_path / f"{task.label}.json").write_text(damage)
    assert not Results(tmp_path).done(task)


def test_results_that_are_forgotten_are_run_again(tmp_path):
    [task] = tasks([DPO], 1)
    results = Results(tmp_path)
    list(run_bench([task], results, Runs(), ORIGIN))
    results.forget(task)
    assert not results.done(task)
    assert not Results(tmp_path).done(task)


def test_the_table_has_mean_and_spread_over_seeds_and_the_time_alone(tmp_path):
    wanted = [*tasks([DPO], 3), *tasks([RLOO], 1)]
    bench(wanted, tmp_path, Runs(failing=["rloo-1", "dpo-3"]))
    lines = markdown(rows(results_of(wanted, tmp_path))).splitlines()
    assert lines[2] == (
        "| `dpo` | judge | 2 of 3 | 0.375 ± 0.177 | 1.375 ± 0.177 | +1.000 ± 0.000 | 5.0 ± 0.0 | 10,240 | 60 ± 0 | 290 ± 0 "
        "| abc123 | 2 cores, x86_64 |"
    )
    assert lines[3].startswith("| `rloo` | failed | 0 of 1 | – |")
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == lines[3].count("|")
    assert lines[5:] == [
        "- `dpo`, seed 3, failed: it ended with status 1: no \\| space left",
        "- `rloo`, seed 1, failed: it ended with status 1: no \\| space left",
    ]


def test_one_value_has_no_spread():
    assert spread([1.234], ".2f") == "1.23"
    assert spread([1.0, 2.0, 3.0], "+.1f") == "+2.0 ± 1.0"


def test_the_table_goes_between_the_markers_and_the_prose_stays(tmp_path):
    page = tmp_path / "recipes.md"
    page.write_text(f"# Recipes\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    write_between_markers(page, "| new |\n")
    assert page.read_text() == f"# Recipes\n\nBefore.\n\n{BEGIN}\n| new |\n{END}\n\nAfter.\n"


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}", f"{BEGIN}\n{END}\n{END}"])
def test_a_page_without_the_markers_is_refused_and_stays(text, tmp_path):
    page = tmp_path / "recipes.md"
    page.write_text(text)
    with pytest.raises(FailedPrecondition, match="needs the lines"):
        write_between_markers(page, "| new |\n")
    assert page.read_text() == text


def test_the_page_has_the_curves_of_each_recipe_and_stands_alone(tmp_path):
    wanted = tasks([DPO, RLOO], 2)
    bench(wanted, tmp_path, Runs(failing=["rloo-2"]))
    page = tmp_path / "page.html"
    write_page(page, rows(results_of(wanted, tmp_path)))
    text = page.read_text(encoding="utf-8")
    assert text.count("<figure>") == 2  # the score of each
    assert "seed 2 failed: it ended with status 1: no | space left" in text
    assert 'src="' not in text
    assert 'href="http' not in text.replace('xlink:href="#', "")


def test_a_dry_run_says_what_is_done_and_what_would_be_run(tmp_path):
    from honed.recipes.catalogue import find_recipe

    task = Task(find_recipe("dpo"), 1)
    list(run_bench([task], Results(tmp_path / "results"), Runs(), ORIGIN))
    asked = ["recipes", "bench", "dpo", "rloo", "--seeds", "2", "--directory", str(tmp_path), "--dry-run"]
    shown = CliRunner().invoke(app, asked)
    states = [line.split() for line in shown.stdout.splitlines()[1:]]
    assert states == [["dpo", "1", "done"], ["rloo", "1", "run"], ["dpo", "2", "run"], ["rloo", "2", "run"]]
    fresh = CliRunner().invoke(app, [*asked, "--fresh"])
    assert "done" not in fresh.stdout
    assert json.loads((tmp_path / "results" / "dpo-1.json").read_text())["figures"] is not None


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are():
    refused = CliRunner().invoke(app, ["recipes", "bench", "ppo2"])
    assert refused.exit_code == 1
    assert "there is no recipe 'ppo2'; there are best-of-n, dpo, " in refused.output


def test_the_page_keeps_the_rows_of_recipes_that_this_call_does_not_run(tmp_path, monkeypatch):
    from honed.recipes.catalogue import find_recipe

    run = Runs()
    list(run_bench([Task(find_recipe("dpo"), 1)], Results(tmp_path / "kept"), run, ORIGIN))
    page = tmp_path / "recipes.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    run.runs = tmp_path / "runs"
    monkeypatch.setattr("honed.recipes.bench.process.ProcessRunner", lambda *places: run)
    asked = [
        "recipes",
        "bench",
        "rloo",
        "--seeds",
        "1",
        "--directory",
        str(tmp_path / "out"),
        "--results",
        str(tmp_path / "kept"),
    ]
    done = CliRunner().invoke(app, [*asked, "--table", str(page)])
    assert done.exit_code == 0, done.output
    assert run.ran == ["dpo-1", "rloo-1"]
    assert sorted(file.name for file in (tmp_path / "kept").iterdir()) == ["dpo-1.json", "rloo-1.json"]
    assert [name for name in ("`dpo`", "`rloo`") if name in page.read_text()] == ["`dpo`", "`rloo`"]
    assert "`dpo`" not in done.stdout


def test_a_page_that_cannot_take_the_table_is_refused_before_anything_runs(tmp_path, monkeypatch):
    run = Runs()
    monkeypatch.setattr("honed.recipes.bench.process.ProcessRunner", lambda *places: run)
    asked = ["recipes", "bench", "rloo", "--directory", str(tmp_path), "--table", str(tmp_path / "no.md")]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code == 1
    assert "no.md cannot be read: No such file" in refused.output
    assert run.ran == []
