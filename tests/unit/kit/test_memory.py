"""Memory that is freed stays with the process: counted in page faults of a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from honed.cli import run as run_commands
from honed.cli.main import app
from honed.kit import memory

_CHILD = """
import resource, sys
from honed.kit.memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use(): [bytearray(16 << 20) for _ in range(4)]
use()
before = faults()
for _ in range(5): use()
print(faults() - before)
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this machine's C library is not glibc")


def count(how: str, **variables: str) -> tuple[str, int]:
    """What `keep_freed_memory` said, and the page faults of five rounds in which 64 MiB are used and freed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    ran = subprocess.run(
        [sys.executable, "-c", _CHILD, how], env={**environment, **variables}, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    said, faults = ran.stdout.split()
    return said, int(faults)


@needs_glibc
def test_what_is_freed_is_used_again_without_page_faults() -> None:
    said, faults = count("keep")
    _, otherwise = count("leave")
    assert said == "True"
    assert faults < 500
    assert otherwise > 20 * faults


@needs_glibc
@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
def test_settings_of_the_environment_stand(name: str, value: str) -> None:
    _, kept = count("keep")
    said, faults = count("keep", **{name: value})
    assert said == "False"
    assert faults > 20 * kept


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (("serve", "learner"), True),
        (("job", "pretrain"), True),
        (("job", "reward-model"), True),
        (("serve", "reward"), False),
        (("serve", "generation"), False),
    ],
)
def test_the_learner_and_its_jobs_ask_for_it(
    command: tuple[str, ...], wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: asked.append(True))
    monkeypatch.setattr(run_commands, "_keep_private", lambda: None)  # of this process, which runs other tests
    done = CliRunner().invoke(app, [*command, "--run-file", str(tmp_path / "missing.yaml")])
    assert done.exit_code != 0
    assert bool(asked) is wanted
