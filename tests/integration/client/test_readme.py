"""What the README shows runs as it stands there, against a run's services."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tests.integration.client.conftest import Run
from typer.testing import CliRunner

from honed.cli.main import app

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def demo_is_up(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's directory, `out/demo`, is this run's."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo").symlink_to(run.directory)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_samples_run_and_print(code: str, demo_is_up: None, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "film" in capsys.readouterr().out


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("honed ")]


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_readme_exists_with_its_options(line: str) -> None:
    """By the help of the command itself: an option that is not there is refused before `--help` is answered."""
    words = shlex.split(line)[1:]
    options = [word.split("=")[0] for word in words if word.startswith("-")]
    while words:
        answer = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(app, [*words, "--help"])
        if answer.exit_code == 0 and "Usage:" in answer.stdout:
            break
        words.pop()
    assert words, f"no command answers to {line!r}"
    whole = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(app, ["--help"])  # options before the command
    plain = re.sub(r"\x1b\[[0-9;]*m", "", answer.stdout + whole.stdout)
    assert [option for option in options if option not in plain] == []


def asks_once(line: str) -> bool:
    return line.split()[1] in ("generate", "score") or line == "honed versions"


@pytest.mark.parametrize("line", [line for line in commands() if asks_once(line)])
def test_the_commands_that_ask_once_answer(line: str, demo_is_up: None) -> None:
    answer = CliRunner().invoke(app, [*shlex.split(line)[1:], "--run", "out/demo"])
    assert answer.exit_code == 0, answer.output
