"""What a run does otherwise than its recipe, as the command line gives it."""

import pytest

from honed.kit.errors import InvalidArgument
from honed.recipes.changes import changed_tree
from honed.recipes.running import recipe_run_settings
from honed.settings_file import SettingsError


def test_values_are_those_of_a_run_file(tmp_path):
    changes = ["learner.max_staleness=0", "learner.kl.coefficient=0.5", "learner.ptx=null", "seed=4"]
    assert changed_tree(changes) == {
        "learner": {"max_staleness": 0, "kl": {"coefficient": 0.5}, "ptx": None},
        "seed": 4,
    }
    settings = recipe_run_settings("instructgpt", tmp_path, None, None, changes)
    assert (settings.learner.max_staleness, settings.learner.ptx, settings.seed) == (0, None, 4)
    assert settings.learner.kl.controller == "fixed", "the rest is the recipe's"


@pytest.mark.parametrize(
    "changes", [["learner"], ["=1"], ["learner..x=1"], ["a=1", "a.b=2"], ["a.b=2", "a=1"], ["a=1", "a=2"], ["a=[1"]]
)
def test_what_is_no_change_is_refused(changes):
    with pytest.raises(InvalidArgument, match="--set"):
        changed_tree(changes)


def test_a_setting_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(SettingsError, match=r"learner\.max_stalenes"):
        recipe_run_settings("dpo", tmp_path, None, None, ["learner.max_stalenes=0"])
