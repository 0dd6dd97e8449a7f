"""Bad input at the command line, each in its own process as a person meets it: one message that names what is wrong."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.support.run import environment, run_tree, write_run_file

from honed.queue.embedded import free_port


async def honed(*arguments: str, **variables: str) -> tuple[int, str]:
    """Exit status and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "honed.cli.main", *arguments),
        env=environment(**variables),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(90):
        _, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, errors.decode()


def one_message(text: str) -> str:
    """What a person reads: no traceback."""
    assert "Traceback" not in text
    assert text.startswith("honed: "), text
    return text


def changed(tree: Mapping[str, Any], section: str, **values: Any) -> dict[str, Any]:
    return {**tree, section: {**tree.get(section, {}), **values}}


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return run_tree(tmp_path)


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("learner", {"bach": 8}, ["learner.bach", "learner.batch"]),
        ("learner", {"batch": "many"}, ["learner.batch"]),
        ("generation", {"max_prompt_tokens": 200, "max_model_tokens": 100}, ["generation.max_prompt_tokens"]),
        ("conductor", {"response_tokens": 97}, ["conductor.response_tokens", "96"]),
    ],
)
async def test_a_wrong_key_or_value_of_the_run_file_is_named(
    tree: dict[str, Any], tmp_path: Path, section: str, values: dict[str, Any], words: list[str]
) -> None:
    file = write_run_file(tmp_path / "run.yaml", changed(tree, section, **values))
    status, text = await honed("up", "--run-file", str(file))
    assert status == 1
    assert all(word in one_message(text) for word in words), text
    assert not (tmp_path / "run").exists(), "nothing was begun"


async def test_a_run_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    status, text = await honed("up", "--run-file", str(tmp_path / "no.yaml"))
    assert (status, "no.yaml" in one_message(text)) == (1, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "prompts.jsonl cannot be read: No such file"),
        ('{"token_ids": [5, 6]}\n{"token_ids": [5,', "prompts.jsonl, line 2: not JSON"),
        ('{"question": "why"}\n', "prompts.jsonl, line 1: needs `text`, `token_ids` or `messages`"),
    ],
)
async def test_a_missing_or_truncated_prompts_file_is_named_before_any_service_starts(
    tree: dict[str, Any], tmp_path: Path, content: str | None, words: str
) -> None:
    (tmp_path / "prompts.jsonl").unlink()
    if content is not None:
        (tmp_path / "prompts.jsonl").write_text(content)
    status, text = await honed("up", "--run-file", str(write_run_file(tmp_path / "run.yaml", tree)))
    assert (status, words in one_message(text)) == (1, True), text
    assert not list((tmp_path / "run").glob("logs/*"))


async def test_a_model_to_start_from_that_is_not_there_fails_the_job_with_the_fields_name(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    file = write_run_file(tmp_path / "run.yaml", changed(tree, "conductor", start_from=str(tmp_path / "nowhere")))
    status, text = await honed("job", "pretrain", "--run-file", str(file))
    assert status == 1
    assert "conductor.start_from" in one_message(text)
    assert "nowhere" in text


@pytest.mark.parametrize("service", ["generation", "reward", "learner", "conductor"])
async def test_a_service_without_redis_says_what_to_do(tree: dict[str, Any], tmp_path: Path, service: str) -> None:
    file = write_run_file(tmp_path / "run.yaml", changed(tree, "conductor", launcher="none"))
    status, text = await honed("serve", service, "--run-file", str(file))
    assert status == 1
    assert "queue.url is not set" in text.splitlines()[-1]


async def test_a_generator_that_the_learner_could_not_reach_says_what_to_set(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = changed(changed(tree, "conductor", launcher="none"), "generation", host="0.0.0.0", control_port=free_port())
    file = write_run_file(tmp_path / "run.yaml", changed(tree, "queue", url="redis://127.0.0.1:1/0"))
    status, text = await honed("serve", "generation", "--run-file", str(file))
    assert status == 1
    assert "generation.control_address is not set" in text.splitlines()[-1]
    assert "HONED_GENERATION__CONTROL_ADDRESS" in text.splitlines()[-1]


async def test_a_directory_in_use_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    import fcntl

    directory = tmp_path / "run"
    directory.mkdir()
    with (directory / "run.lock").open("w") as lock:
        lock.write("4242")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, text = await honed("up", "--run-file", str(write_run_file(tmp_path / "run.yaml", tree)))
    assert status == 1
    assert "is in use by the run of process 4242" in one_message(text)


async def test_commands_without_a_run_say_how_to_get_one(tmp_path: Path) -> None:
    status, text = await honed("generate", "hello", HONED_RUN_DIR=str(tmp_path))
    assert status == 1
    assert "endpoints.json" in one_message(text)
    (tmp_path / "endpoints.json").write_text(json.dumps({"generation": "127.0.0.1:1"}))
    status, text = await honed("generate", "hello", "--timeout", "2", HONED_RUN_DIR=str(tmp_path))
    assert status == 1
    assert "127.0.0.1:1" in one_message(text)
