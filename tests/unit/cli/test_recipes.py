"""`honed recipes`: each is a run file that loads, passes the check, and says what it is."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from honed.check.run import check_run
from honed.cli.demo import demo_settings
from honed.cli.main import app
from honed.kit.errors import NotFound
from honed.recipes.catalogue import DEMO, find_recipe, recipes
from honed.recipes.running import recipe_run_settings

runner = CliRunner()
NAMES = [recipe.name for recipe in recipes()]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("HONED_RUN_FILE", "HONED_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


def test_the_list_names_each_with_a_title():
    listed = json.loads(runner.invoke(app, ["recipes", "list", "--json"]).stdout)
    assert [row["name"] for row in listed] == NAMES
    assert {"dpo", "instructgpt", "lm-human-preferences", "rl4lms-ppo", "rloo", "trl-gpt2-sentiment", "trlx-ppo"} <= {*NAMES}
    assert all(len(row["title"]) > 20 for row in listed)
    shown = runner.invoke(app, ["recipes", "list"]).stdout
    assert all(row["name"] in shown for row in listed)


@pytest.mark.parametrize("name", NAMES)
def test_each_loads_passes_the_check_and_begins_with_what_it_reproduces_and_where_it_differs(name, tmp_path):
    recipe, settings = find_recipe(name), recipe_run_settings(name, tmp_path, 7)
    assert (settings.run, settings.seed, settings.directory) == (name, 7, tmp_path)
    assert settings.data.made is not None
    assert settings.data.texts == (tmp_path / "data" / "texts.jsonl",)
    assert [finding for finding in check_run(settings, fast=True).findings if finding.severity == "error"] == []
    comment = recipe.text.partition("\nrun:")[0].splitlines()
    assert len(comment) >= 4
    assert all(line.startswith("#") for line in comment)
    assert runner.invoke(app, ["recipes", "show", name]).stdout == recipe.text
    assert yaml.safe_load(recipe.text)["run"] == name


@pytest.mark.parametrize("section", ["pretrain", "reward_training"])
def test_recipes_on_the_ratings_with_a_reward_model_share_what_they_are_trained_on(section, tmp_path):
    """Equal sections give equal digests, so that a bench trains them once a seed."""
    of = {name: recipe_run_settings(name, tmp_path, 1) for name in NAMES}
    on_ratings = [
        settings for settings in of.values() if settings.data.made == "ratings" and settings.goes_through("reward_model")
    ]
    assert len(on_ratings) >= 3
    assert len({getattr(settings, section).model_dump_json() for settings in on_ratings}) == 1


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(NotFound, match=r"no recipe 'ppo2'; there are best-of-n, dpo, grpo"):
        find_recipe("ppo2")
    assert "ppo2" in runner.invoke(app, ["recipes", "run", "ppo2"]).output


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"data": {"made": "hanoi"}}, "data.made: there is no 'hanoi'; there are continuations, openings, rankings, "),
        ({"learner": {"algorithm": "ppo2"}}, "learner.algorithm: there is no 'ppo2'; there are a2c, "),
        ({"phases": ["pretrain", "distill"]}, "phases.1: Input should be 'pretrain', 'sft', 'reward_model' or 'online'"),
        (
            {"reward": {"scorers": [{"name": "politeness", "kind": "function", "source": "politeness"}]}},
            "no entry point 'politeness' in the group honed.scorers; installed: ",
        ),
    ],
    ids=["data", "algorithm", "phase", "scorer"],
)
def test_what_a_run_file_names_and_is_not_there_is_refused_with_what_there_is(changed, told, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(find_recipe("grpo-verifiable").text), **changed}))
    refused = runner.invoke(app, ["up", str(path)])
    assert refused.exit_code == 1
    assert told in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            ["reward.scorers=[{name: p, kind: function, source: politeness}]"],
            "no entry point 'politeness' in the group honed.scorers; installed: ",
        ),
        (["learner.algorithm=ppo2"], "learner.algorithm: there is no 'ppo2'; there are a2c, "),
    ],
)
def test_a_recipe_that_is_changed_to_what_is_not_there_is_refused_before_anything_trains(changes, told, tmp_path):
    options = [word for change in changes for word in ("--set", change)]
    refused = runner.invoke(app, ["recipes", "run", "grpo-verifiable", "--directory", str(tmp_path / "run"), *options])
    assert refused.exit_code == 1
    assert told in " ".join(refused.output.split())
    assert not (tmp_path / "run").exists()


def test_the_demo_looks_at_its_run_file_before_anything_trains(tmp_path):
    path = tmp_path / "mine.yaml"
    tree = yaml.safe_load(find_recipe(DEMO).text)
    tree["reward"]["scorers"].append({"name": "politeness", "kind": "function", "source": "politeness"})
    path.write_text(yaml.safe_dump(tree))
    refused = runner.invoke(app, ["demo", "--run-file", str(path), "--directory", str(tmp_path / "run")])
    assert refused.exit_code == 1
    assert "no entry point 'politeness' in the group honed.scorers; installed: " in " ".join(refused.output.split())
    assert not (tmp_path / "run").exists()


def test_the_demo_is_a_recipe_of_two_names(tmp_path):
    assert find_recipe("demo") == find_recipe(DEMO)
    demo, recipe = demo_settings(None, tmp_path), recipe_run_settings(DEMO, tmp_path, None)
    assert demo == recipe


def test_the_demo_runs_a_run_file_on_its_own_data(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run: mine\nreward: {scorers: [{name: words, kind: function, source: length}]}\n")
    settings = demo_settings(path, tmp_path / "out")
    assert settings.run == "mine"
    assert settings.data.prompts == tmp_path / "out" / "data" / "prompts.jsonl"
