"""What the command says where the bare package is installed, and who can read what it writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from honed.cli.missing import missing_package

WITHOUT = "import sys; blocked = sys.argv.pop(1); sys.modules[blocked] = None; from honed.cli.entry import main; main()"


def honed_without(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command where a package cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, package, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
    )


def test_without_the_command_lines_packages_it_names_the_extra() -> None:
    done = honed_without("typer", "--help")
    assert done.returncode == 1
    assert done.stderr == (
        "honed: the package typer is not installed: install honed[cli] (or honed[local] for everything on one machine)\n"
    )


def test_a_command_whose_packages_are_missing_names_their_extra(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"directory: {tmp_path}/run")
    done = honed_without("sqlalchemy", "serve", "preference", "--run-file", str(tmp_path / "run.yaml"))
    assert done.returncode == 1
    assert "the package sqlalchemy is not installed: install honed[preference]" in done.stderr


def test_without_the_client_of_kubernetes_it_names_the_extra() -> None:
    done = honed_without("kubernetes", "--cluster", "status")
    assert done.returncode == 1
    assert "the package kubernetes is not installed: install honed[cluster]" in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("x", name="honed.nothing"),
        ModuleNotFoundError("x", name="my_scorer"),
        ImportError("x"),
        ValueError(),
    ],
)
def test_other_errors_are_not_taken_for_a_missing_package(error: Exception) -> None:
    assert missing_package(error) == ""


def test_what_a_service_writes_only_its_user_can_read(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "import honed.preference.main as preference\n"
        "from honed.cli.entry import main\n"
        "async def run(settings):\n"
        "    settings.directory.mkdir(parents=True, exist_ok=True)\n"
        "    (settings.directory / 'log').write_text('a text')\n"
        "preference.run = run\n"
        "os.umask(0o022)\n"
        "main()\n"
    )
    (tmp_path / "run.yaml").write_text(f"directory: {tmp_path}/run")
    subprocess.run(
        [sys.executable, "-c", code, "serve", "preference", "--run-file", str(tmp_path / "run.yaml")],
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
    )
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "run" / "log").stat().st_mode & 0o777 == 0o600
