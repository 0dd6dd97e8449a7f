"""The command line without any server: help, usage, errors, formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextvars import copy_context
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from honed.cli import judge, output
from honed.cli.connection import find_run
from honed.cli.main import app
from honed.kit.errors import Unavailable


def honed(*arguments: str, **environment: str):
    return CliRunner().invoke(app, list(arguments), env=environment)


def commands():
    root = get_command(app)
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        yield from (((name, sub), c) for sub, c in inner.items()) if inner else [((name,), command)]


@pytest.mark.parametrize(
    "name", ["up", "demo", "serve", "generate", "score", "judge", "status", "versions", "prompts", "dead", "config", "data"]
)
def test_the_help_lists_each_command(name: str) -> None:
    assert name in honed("--help").stdout


@pytest.mark.parametrize(("path", "command"), commands(), ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_each_commands_help_teaches_by_an_example(path, command) -> None:
    if not command.hidden:
        assert f"honed {' '.join(path)}" in " ".join(honed(*path, "--help").stdout.split())


def test_the_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from honed.cli.main import app; "
        "heavy = {'torch', 'transformers', 'vllm', 'redis', 'sqlalchemy', 'protovalidate'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    root = str(Path(output.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x"],
        ["score", "x"],
        ["judge", "stats"],
        ["status"],
        ["versions"],
        ["dead", "list"],
    ],
)
def test_without_a_run_each_command_says_how_to_start_one(arguments, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HONED_RUN_DIR", raising=False)
    done = honed(*arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("honed: no run found")
    assert "honed up" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "x", "--n", "0"],
        ["score"],
        ["generate", "x", "--stream", "--n", "2"],
        ["judge", "import"],
        ["no"],
    ],
)
def test_wrong_usage_ends_with_2(arguments) -> None:
    assert honed(*arguments).exit_code == 2


def test_debug_lets_an_error_through(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(honed("--debug", "status").exception, ValueError)


def test_a_bug_is_told_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def broken(*_: object) -> Path:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("honed.cli.status.find_run", broken)
    done = honed("status")
    assert done.exit_code == 1
    assert "internal error, ZeroDivisionError: oops" in done.stderr


@pytest.mark.parametrize(("error", "status"), [(Unavailable("the store is away"), os.EX_TEMPFAIL), (ValueError("line 3"), 1)])
def test_a_job_says_by_its_exit_status_whether_what_failed_may_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, status: int
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("honed.learner.jobs.pretrain.run", fail)
    monkeypatch.setattr("honed.kit.log.configure_logging", lambda *_: None)
    monkeypatch.setattr("honed.cli.run._keep_private", lambda: None)
    answer = copy_context().run(honed, "job", "pretrain")
    assert (answer.exit_code, answer.stderr.splitlines()[-1]) == (status, f"honed: {error}")


def test_a_run_is_found_by_option_environment_and_age(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in ((50, "new"), (100, "old")):
        place = tmp_path / "out" / name
        place.mkdir(parents=True)
        (place / "endpoints.json").write_text("{}")
        os.utime(place / "endpoints.json", (time.time() - age, time.time() - age))
    assert find_run(None, {}) == Path("out/new")
    assert find_run(None, {"HONED_RUN_DIR": "elsewhere"}) == Path("elsewhere")
    assert find_run(Path("mine"), {"HONED_RUN_DIR": "elsewhere"}) == Path("mine")


def test_config_show_tells_each_values_source_and_masks_secrets(tmp_path) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text("run: demo\nqueue: {url: 'redis://me:s3same@host:1/0'}\n")
    environment = {"HONED_QUEUE__PASSWORD": "pa55word", "HONED_LEARNER__BATCH": "512"}
    done = honed("config", "show", "--run-file", str(run_file), "--json", **environment)
    tree = json.loads(done.stdout)
    assert tree["run"] == {"value": "demo", "source": "file"}
    assert tree["learner.batch"] == {"value": 512, "source": "environment"}
    assert tree["generation.engine"] == {"value": "auto", "source": "default"}
    assert tree["queue.url"]["value"] == "redis://me:**********@host:1/0"
    assert tree["queue.password"]["value"] == "**********"
    table = honed("config", "show", "--run-file", str(run_file), "--set", **environment).stdout
    assert "s3same" not in done.stdout + table
    assert "pa55word" not in done.stdout + table
    assert len(table.splitlines()) == 5


def test_an_unknown_key_is_one_line_that_names_the_nearest(tmp_path) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text("learner: {bach: 3}\n")
    done = honed("config", "show", "--run-file", str(run_file))
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "learner.bach: unknown key; did you mean learner.batch?" in done.stderr


def test_a_damaged_download_is_one_line(tmp_path) -> None:
    from honed.demo.data.fetch import HUMAN_RATINGS

    (tmp_path / HUMAN_RATINGS.filename).write_bytes(b"half")
    done = honed("data", "fetch", "--to", str(tmp_path))
    assert done.exit_code == 1
    assert "sha256 expected" in done.stderr
    assert "Traceback" not in done.output


def test_texts_of_a_model_cannot_speak_to_the_terminal() -> None:
    assert output.printable("a\x1b[2Jb\n") == "a\ufffd[2Jb\n"


def test_the_formats_and_kinds_are_those_of_the_record() -> None:
    from honed.formats.files import FORMATS
    from honed.preference.content import KINDS

    assert [each.value for each in judge.FileFormat] == list(FORMATS)
    assert {each.value for each in judge.Kind} == set(KINDS)


def test_an_address_needs_no_run(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = honed("generate", "x", "--address", "127.0.0.1:1", "--timeout", "5")
    assert done.exit_code == 1
    assert "generation service at 127.0.0.1:1 did not answer" in done.stderr
