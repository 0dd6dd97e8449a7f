"""`honed recipes`: each is a run file that loads, and says what it is."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from honed.cli.main import app
from honed.cli.recipe_run import recipe_run_settings
from honed.kit.errors import NotFound
from honed.recipes.catalogue import find_recipe, recipes

runner = CliRunner()


def test_the_list_names_each_with_a_title():
    listed = json.loads(runner.invoke(app, ["recipes", "list", "--json"]).stdout)
    assert {"demo", "dpo", "grpo"} <= {row["name"] for row in listed}
    assert all(len(row["title"]) > 20 for row in listed)
    shown = runner.invoke(app, ["recipes", "list"]).stdout
    assert all(row["name"] in shown for row in listed)


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_each_loads_and_begins_with_what_it_reproduces_and_where_it_differs(recipe, tmp_path, monkeypatch):
    for name in ("HONED_RUN_FILE", "HONED_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    settings = recipe_run_settings(recipe.name, tmp_path, 7)
    assert (settings.run, settings.seed, settings.directory) == (recipe.name, 7, tmp_path)
    assert recipe.text.startswith("# ")
    assert runner.invoke(app, ["recipes", "show", recipe.name]).stdout == recipe.text
    assert yaml.safe_load(recipe.text)["run"] == recipe.name


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(NotFound, match=r"no recipe 'ppo2'; there are demo, dpo, grpo"):
        find_recipe("ppo2")
    assert "ppo2" in runner.invoke(app, ["recipes", "run", "ppo2"]).output
