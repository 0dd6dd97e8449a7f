"""A recipe runs from the data that it makes to its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]

# So many tokens that some walks arrive: without a reward nothing is learned.
SHORT = ["pretrain.tokens=60_000", "learner.steps=2", "learner.batch=20", "generation.engine=transformers"]


def test_a_recipe_is_run_and_measured_on_what_is_held_out(tmp_path: Path) -> None:
    place = tmp_path / "run"
    changes = [word for change in SHORT for word in ("--set", change)]
    command = [sys.executable, "-m", "honed.cli.main", "recipes", "run", "trlx-ppo", "--seed", "2", "--directory", str(place)]
    done = subprocess.run([*command, *changes], capture_output=True, text=True, timeout=220, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((place / "recipe.json").read_text())
    assert (written["recipe"], written["seed"], written["updates"], written["examples"]) == ("trlx-ppo", 2, 2, 40)
    assert written["figure"] == "optimality of sampled walks (0 to 1)"
    assert 0.0 <= written["before"] <= 1.0
    assert 0.0 <= written["after"] <= 1.0
    assert written["kl_nats"] > 0
    assert written["versions_pushed"] == 2
    assert len(written["curves"]["score_mean"]) == 2
    assert "What the recipe trlx-ppo changed" in done.stdout
    assert (place / "report.html").is_file()
