"""`honed prompts` against a conductor that keeps prompts in a real Redis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.client import served
from tests.support.tiny import make_tokenizer
from typer.testing import CliRunner

from honed.cli.main import app
from honed.conductor.settings import PromptMixSettings
from honed.conductor.submission import submit_prompts
from honed.models.prompts import PromptEncoder
from honed.queue.connection import RedisLink
from honed.queue.embedded import EmbeddedRedis
from honed.queue.inbox import PromptInbox
from honed.queue.keys import SUBMITTED, RunKeys
from honed.v1 import conductor_pb2

pytestmark = pytest.mark.redis

LIMIT = 1500


class Conductor(served.Conductor):
    inbox: PromptInbox
    encoder: PromptEncoder

    async def GetRun(self, request: conductor_pb2.GetRunRequest, context: Any) -> conductor_pb2.GetRunResponse:
        answer = await super().GetRun(request, context)
        answer.run.figures["prompts_submitted_waiting"] = len(await self.inbox.peek(SUBMITTED, LIMIT))
        return answer

    async def SubmitPrompts(
        self, request: conductor_pb2.SubmitPromptsRequest, context: Any
    ) -> conductor_pb2.SubmitPromptsResponse:
        return await submit_prompts(request, self.inbox, self.encoder, PromptMixSettings(submitted_limit=LIMIT))


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    make_tokenizer(tmp_path)
    loop, conductor = served.Loop(), Conductor()
    try:
        link = loop.enter(RedisLink(loop.enter(EmbeddedRedis(tmp_path / "redis"))))
        conductor.inbox = PromptInbox(link, RunKeys("demo"))
        conductor.encoder = PromptEncoder.of_model(tmp_path, longest=20)
        tokens = served.make_tokens(tmp_path)
        (tmp_path / "endpoints.json").write_text(
            json.dumps({"conductor": loop.serve(conductor.servicer(), tokens), "token_file": "tokens/internal.token"})
        )
        yield tmp_path
    finally:
        loop.close()


def prompts(directory: Path, *arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, ["prompts", *arguments, "--run", str(directory)], input=stdin)


def write(directory: Path, count: int) -> str:
    path = directory / "more.jsonl"
    path.write_text("".join(json.dumps({"text": f"prompt {number}"}) + "\n" for number in range(count)))
    return str(path)


def waiting(directory: Path) -> int:
    return json.loads(prompts(directory, "status", "--json").stdout)["submitted_waiting"]


def test_a_file_of_more_prompts_than_a_call_takes_is_added_once_under_its_key(directory: Path) -> None:
    file = write(directory, 1300)
    for _ in range(2):
        done = prompts(directory, "add", file, "--key", "monday")
        assert (done.exit_code, done.stderr) == (0, "1300 prompts added; 1300 wait\n")
    assert waiting(directory) == 1300
    assert "1500" in prompts(directory, "status").stdout, "admitted so far"


def test_standard_input_is_read_and_each_kind_of_prompt_is_sent(directory: Path) -> None:
    done = prompts(directory, "add", "-", stdin='{"text": "a"}\n\n{"token_ids": [3, 4]}\n')
    assert (done.exit_code, waiting(directory)) == (0, 2)
    done = prompts(directory, "add", "-", stdin='{"text": "a", "reference": {"answer": 42}}\n')
    assert (done.exit_code, waiting(directory)) == (0, 3)
    done = prompts(directory, "add", "-", stdin='{"messages": [{"role": "user", "content": "hello"}]}\n')
    assert done.exit_code == 1
    assert "prompts[0].messages: the model has no chat template" in done.stderr


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        ('{"text": "a"}\n{"text": "b', "line 2: not JSON"),
        ("[]", "line 1: must be a JSON object"),
        ('{"prompt": "a"}', "line 1: needs `text`"),
        ('{"token_ids": [-1]}', "line 1: token_ids"),
        ('{"text": "a prompt that is far too long"}', "prompts[0].text: has 29 tokens"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_and_nothing_of_its_batch_is_added(directory: Path, stdin: str, message: str) -> None:
    done = prompts(directory, "add", "-", stdin=stdin)
    assert done.exit_code == 1
    assert message in done.stderr
    assert waiting(directory) == 0


def test_a_file_for_which_there_is_no_room_says_how_much_was_added(directory: Path) -> None:
    done = prompts(directory, "add", write(directory, 1600), "--patience", "1")
    assert done.exit_code == 1
    assert "conductor.prompt_mix.submitted_limit" in done.stderr
    assert "prompts 1025 to 1536" in done.stderr
    assert "1024 were added" in done.stderr
    assert waiting(directory) == 1024
