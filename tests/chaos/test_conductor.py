"""`honed up` killed -9 in the middle of the loop and started again; a scorer that raises; wrong callers meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from tests.support.run import (
    check_books,
    environment,
    read_books,
    run_tree,
    step_of,
    until,
    write_prompts,
    write_run_file,
)

from honed.learner.loop.journal import read_updates
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.dead import DeadLetters
from honed.queue.embedded import embedded_redis_url
from honed.queue.keys import ROLLOUTS, RunKeys
from honed.queue.stats import StageStats
from honed.workspace import Workspace

pytestmark = [pytest.mark.redis, pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]

STEPS, BATCH = 12, 8

PLUGIN = """
def picky(samples):
    for sample in samples:
        if sample.prompt.startswith("!"):
            raise LookupError("no opinion about shouting")
    return [len(sample.response) % 7 for sample in samples]
"""
METADATA = "Metadata-Version: 2.1\nName: picky\nVersion: 1.2.3\n"
SHOUTING = 2 + sorted(range(33, 127)).index(ord("!"))  # of the byte-level tokenizer: printable ASCII comes first


@dataclass
class Story:
    """What happened."""

    root: Path
    place: Workspace
    killed_at: int = 0
    steps_at_restart: int = 0
    second: tuple[int, str] = (0, "")
    wrong_token: tuple[int, str] = (0, "")
    oversized: tuple[int, str] = (0, "")
    dead_list: tuple[int, str] = (0, "")
    exit_status: int = -1
    books: dict[str, StageStats] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)


def plugin(root: Path) -> Path:
    """A distribution with a scorer, as pip would have installed it."""
    directory = root / "site"
    info = directory / "picky-1.2.3.dist-info"
    info.mkdir(parents=True)
    (directory / "picky.py").write_text(PLUGIN)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text("[honed.scorers]\npicky = picky:picky\n")
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def story(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Story]:
    root = tmp_path_factory.mktemp("conductor")
    write_prompts(root / "prompts.jsonl", 7)
    with (root / "prompts.jsonl").open("a") as prompts:
        prompts.write(f'{{"token_ids": [{SHOUTING}, 70, 71]}}\n')
    tree = run_tree(
        root,
        reward={"scorers": [{"name": "picky", "kind": "function", "source": "picky"}]},
        queue={"lease_s": 2.0, "max_deliveries": 2},
        learner={"batch": BATCH, "steps": STEPS},
        conductor={"response_tokens": 24},
    )
    file = write_run_file(root / "run.yaml", tree)
    variables = environment(plugin(root))
    story = Story(root, Workspace(root / "run"))
    output = root / "up.log"

    @contextlib.asynccontextmanager
    async def up() -> AsyncIterator[asyncio.subprocess.Process]:
        with output.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "honed.cli.main", "up", "--run-file", str(file)), env=variables, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def honed(*arguments: str, **more: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "honed.cli.main", *arguments),
            env={**variables, "HONED_RUN_DIR": str(story.place.root), **more},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        text, _ = await process.communicate()
        return process.returncode or 0, text.decode()

    def reached(step: int, process: asyncio.subprocess.Process) -> bool:
        assert process.returncode is None, output.read_text()[-3000:]
        return step_of(story.place.root) >= step

    async with asyncio.timeout(360):
        async with up() as first:
            await until(lambda: reached(3, first), 180, "step 3")
            story.second = await honed("up", "--run-file", str(file))
            os.kill(first.pid, signal.SIGKILL)
            await first.wait()
            story.killed_at = step_of(story.place.root)
        async with up() as again:
            await until(lambda: reached(STEPS, again), 180, "the last step")
            await until(lambda: "The run is done" in output.read_text(), 60, "the run is done")
            (root / "wrong.token").write_text("honed_wrong\n")
            story.wrong_token = await honed("generate", "hello", "--token-file", str(root / "wrong.token"))
            story.oversized = await honed("generate", "a" * 33)
            story.dead_list = await honed("dead", "list", "--stage", "rollouts")
            async with RedisLink(embedded_redis_url(story.place.redis), retry=RetryPolicy(deadline_s=10)) as link:
                story.books = await read_books(link, "small")
                letters = await DeadLetters(link, RunKeys("small"), ROLLOUTS).list(1000)
                story.reasons = {letter.death.reason for letter in letters}
            again.send_signal(signal.SIGTERM)
            story.exit_status = await again.wait()
    yield story


async def test_the_run_goes_on_where_it_was_and_finishes(story: Story) -> None:
    assert 3 <= story.killed_at < STEPS
    steps = read_updates(story.place.learner)
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    assert story.exit_status == 0


async def test_nothing_trained_twice_or_was_lost_without_a_reason(story: Story) -> None:
    reasons = check_books(story.books, read_updates(story.place.learner))
    assert set(reasons) <= {"stale", "run_finished", "dead_rollouts"}


async def test_a_scorer_that_raises_makes_dead_letters_with_its_reason_and_the_rest_goes_on(story: Story) -> None:
    assert story.books[ROLLOUTS].dead > 0
    assert story.reasons
    # A delivery that a slow machine did not finish says so before the reason of the one before it.
    assert all("LookupError: no opinion about shouting" in reason for reason in story.reasons)
    status, text = story.dead_list
    assert status == 0
    assert "shouting" in " ".join(text.split())


async def test_a_second_run_in_the_same_directory_is_refused(story: Story) -> None:
    status, text = story.second
    assert (status, "is in use by the run of process" in text) == (1, True), text


async def test_a_wrong_token_and_an_oversized_prompt_are_one_clear_message(story: Story) -> None:
    status, text = story.wrong_token
    assert (status, "bearer token is unknown" in text) == (1, True), text
    status, text = story.oversized
    assert (status, "prompt.text" in text, "has 33 " in text) == (1, True, True), text
    assert "Traceback" not in story.wrong_token[1] + story.oversized[1]
