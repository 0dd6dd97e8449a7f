"""`honed dead` on the embedded Redis of a run's directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.client.served import Loop
from typer.testing import CliRunner

from honed.cli.main import app
from honed.config import RunSettings
from honed.queue.connection import RedisLink
from honed.queue.embedded import EmbeddedRedis
from honed.queue.keys import RunKeys
from honed.queue.messages import Message
from honed.queue.stream import WorkQueue
from honed.settings_file import write_settings
from honed.v1 import common_pb2
from honed.workspace import Workspace

pytestmark = pytest.mark.redis


async def bury(url: str, stage: str, body: bytes, name: str) -> None:
    async with RedisLink(url) as link:
        queue = WorkQueue(link, RunKeys("demo"), stage, "worker")
        await queue.put([Message(name, body)])
        [delivery] = await queue.take(1)
        assert await queue.fail(delivery, "the scorer raised", retry=False) == "dead"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    place = Workspace(tmp_path)
    loop = Loop()
    try:
        url = loop.enter(EmbeddedRedis(place.redis))
        write_settings(RunSettings(run="demo", directory=tmp_path), place.effective_settings)
        rollout = common_pb2.Rollout(rollout_id="g/0", group_id="g", run="demo", prompt_token_ids=[5, 6])
        loop.run(bury(url, "rollouts", rollout.SerializeToString(), "g/0"))
        loop.run(bury(url, "prompts", b"\xff\xff", "odd"))
        yield tmp_path
    finally:
        loop.close()


def dead(directory: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["dead", *arguments, "--run", str(directory)])


def letter(directory: Path, stage: str) -> str:
    return json.loads(dead(directory, "list", "--stage", stage, "--json").stdout)["letter"]


def test_dead_letters_are_listed_shown_decoded_and_replayed_once(directory: Path) -> None:
    listed = dead(directory, "list")
    assert "the scorer raised" in listed.stdout
    assert "1 in prompts, 1 in rollouts, 0 in scored" in listed.stderr
    name = letter(directory, "rollouts")
    shown = json.loads(dead(directory, "show", name).stdout)
    assert (shown["message"]["rollout_id"], shown["message"]["prompt_token_ids"]) == ("g/0", [5, 6])
    assert shown["deaths"][0]["reason"] == "the scorer raised"
    first, again = dead(directory, "replay", name), dead(directory, "replay", name)
    assert first.exit_code == again.exit_code == 0
    assert first.stdout == again.stdout
    assert "0 in rollouts" in dead(directory, "list").stderr


def test_a_body_that_is_no_message_is_shown_as_bytes(directory: Path) -> None:
    shown = json.loads(dead(directory, "show", letter(directory, "prompts")).stdout)
    assert (shown["message"]["bytes"], shown["message"]["begins"]) == (2, "ffff")


def test_all_letters_of_a_stage_go_back_together(directory: Path) -> None:
    assert "1 sent back" in dead(directory, "replay", "--all", "--stage", "rollouts").stderr
    assert "1 in prompts, 0 in rollouts" in dead(directory, "list").stderr


def test_an_unknown_letter_is_one_line(directory: Path) -> None:
    for command in ("show", "replay", "delete"):
        done = dead(directory, command, "1-0", *(["--yes"] if command == "delete" else []))
        assert done.exit_code == 1
        assert "no dead letter 1-0" in done.stderr


def test_a_letter_and_all_exclude_each_other(directory: Path) -> None:
    assert dead(directory, "replay").exit_code == 2
    assert dead(directory, "replay", "1-0", "--all").exit_code == 2
    assert dead(directory, "delete").exit_code == 2
    assert dead(directory, "delete", "1-0", "--all").exit_code == 2


def test_a_letter_is_deleted_when_the_person_says_yes(directory: Path) -> None:
    name = letter(directory, "rollouts")
    asked = CliRunner().invoke(app, ["dead", "delete", name, "--run", str(directory)], input="n\n")
    assert asked.exit_code == 1
    assert f"Delete dead letter {name} for good?" in asked.stderr
    assert "1 in rollouts" in dead(directory, "list").stderr
    assert "1 deleted" in dead(directory, "delete", name, "--yes").stderr
    assert "0 in rollouts" in dead(directory, "list").stderr


def test_all_letters_of_a_stage_are_deleted_together(directory: Path) -> None:
    assert (
        "1 of prompts"
        in CliRunner()
        .invoke(app, ["dead", "delete", "--all", "--stage", "prompts", "--run", str(directory)], input="n\n")
        .stderr
    )
    assert "1 deleted" in dead(directory, "delete", "--all", "--stage", "prompts", "-y").stderr
    assert "0 in prompts, 1 in rollouts" in dead(directory, "list").stderr
