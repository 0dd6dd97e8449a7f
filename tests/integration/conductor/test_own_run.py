"""A run of one's own model and data, from a few flags to a report, and its versions compared, promoted and rolled back.

Its processes record whom they connect to, since they do in it all that a run does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
import yaml
from tests.deploy.connections import NOT_ON_ONE_MACHINE, ONLY_ON_ONE_MACHINE, OWN, REDIS, Connection, recorded
from tests.support.reviews import make_review_model, shop_reviews, write_review_files
from tests.support.run import environment, until

from honed.kit.connections import VARIABLE
from honed.queue.embedded import embedded_redis_url
from honed.workspace import Workspace

pytestmark = [pytest.mark.redis, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

STEPS = 3
SETTINGS = {
    "HONED_GENERATION__ENGINE": "transformers",
    "HONED_GENERATION__REPLICAS": "2",
    "HONED_CONDUCTOR__RESPONSE_TOKENS": "12",
    "HONED_LEARNER__BATCH": "8",
    "HONED_LEARNER__LEARNING_RATE": "3e-3",
    "HONED_REWARD_TRAINING__SECONDS": "10",
    "HONED_REWARD_TRAINING__LEARNING_RATE": "2e-3",
    "HONED_REWARD_TRAINING__NORMALISING_SAMPLES": "16",
}


@dataclass
class Story:
    """What happened; JSON answers of commands by name."""

    root: Path
    written: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    connections: frozenset[Connection] = frozenset()
    exit_status: int = -1


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def story(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Story]:
    root = tmp_path_factory.mktemp("own")
    reviews = shop_reviews()
    write_review_files(root, reviews)
    make_review_model(root / "model", reviews)
    story, run = Story(root), root / "out" / "mine"
    record = root / "connections.jsonl"
    variables = environment(**SETTINGS, **{VARIABLE: str(record)})

    async def honed(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "honed.cli.main", *arguments),
            env=variables,
            cwd=root,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        text, errors = await process.communicate()
        assert process.returncode == 0, f"honed {' '.join(arguments)}: {errors.decode()[-2000:]}"
        return text.decode()

    async def ask(name: str, *arguments: str) -> Any:
        story.answers[name] = json.loads(await honed(*arguments, "--json", "--run", str(run)))
        return story.answers[name]

    async def served() -> set[str]:
        processes = (await ask("status", "status"))["run"]["processes"]
        return {p["version"] for p in processes if p["name"].startswith("generation-")}

    await honed(
        "init", "--model", "model", "--prompts", "prompts.jsonl", "--judgements", "pairs.jsonl:trl",
        "--evaluation-judgements", "held.jsonl:trl", "--evaluation-prompts", "evaluation.jsonl",
        "--steps", str(STEPS), "-o", "mine.yaml",
    )  # fmt: skip
    story.written = yaml.safe_load((root / "mine.yaml").read_text())
    story.answers["check"] = json.loads(await honed("check", "mine.yaml", "--json"))
    log = root / "up.log"
    with log.open("wb") as output:
        up = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "honed.cli.main", "up", "mine.yaml"), env=variables, cwd=root, stdout=output, stderr=output
        )

    def said(words: str) -> bool:
        assert up.returncode is None, log.read_text()[-3000:]
        return words in log.read_text()

    try:
        async with asyncio.timeout(560):
            await until(lambda: said("The run is done"), 200, "the run is done")
            story.report = json.loads((run / "report.json").read_text())
            await ask("before", "status")
            await ask("compare", "versions", "compare", "0.0", f"1.{STEPS}", "--samples", "4")
            await ask("promote", "versions", "promote", "1.1", "--reason", "reads well")
            await ask("rollback", "versions", "rollback", "1.2")
            await until(
                lambda: served_equals(served, {f"2.{STEPS}"}), 60, "it trains on, and both generators serve the end", 0.5
            )
            await ask("scale", "scale", "reward=2")
            story.answers["endpoints"] = json.loads((run / "endpoints.json").read_text())
            story.answers["versions"] = [
                json.loads(line) for line in (await honed("versions", "--json", "--run", str(run))).splitlines()
            ]
            redis = urlsplit(embedded_redis_url(Workspace(run).redis)).port
            up.send_signal(signal.SIGINT)
            story.exit_status = await up.wait()
            story.connections = recorded(record.read_text().splitlines(), {redis or 0: ("redis", REDIS)})
    finally:
        with contextlib.suppress(ProcessLookupError):
            up.kill()
        await up.wait()
    yield story


async def served_equals(served: Any, versions: set[str]) -> bool:
    return bool(await served() == versions)


async def test_the_run_file_of_a_few_flags_has_settings_of_the_model(story: Story) -> None:
    written = story.written
    assert written["generation"]["max_model_tokens"] == 96, "the model's own limit"
    assert written["conductor"]["response_tokens"] + written["generation"]["max_prompt_tokens"] <= 96
    assert written["reward"]["scorers"][0]["source"] == "trained"
    assert written["data"]["evaluation"] == {
        "judgements": {"file": "held.jsonl", "format": "trl", "source": "held"},
        "prompts": "evaluation.jsonl",
    }


async def test_the_check_finds_nothing_wrong_and_counts_everything(story: Story) -> None:
    check = story.answers["check"]
    assert check["ok"], check["findings"]
    assert check["figures"]["judgements pairs.jsonl"]["lines"] == 6000
    assert check["figures"]["memory_gib"]["needed"] > 0


async def test_the_reward_model_agrees_with_people_on_texts_that_it_has_not_seen(story: Story) -> None:
    report = story.report
    assert report["outcome"] == "finished"
    assert report["judgements_imported"] == 6000
    assert report["agreement_pairs"] == 1000
    assert report["agreement"] > 0.53, "chance is 0.5, with a standard error of 0.016"


async def test_the_report_has_the_same_prompts_before_and_after(story: Story) -> None:
    samples = story.report["samples"]
    assert len(samples) == 8
    assert all(row["prompt"] and math.isfinite(row["reward_before"]) and math.isfinite(row["reward_after"]) for row in samples)
    assert any(row["before"] != row["after"] for row in samples)
    assert "<svg" in (story.root / "out" / "mine" / "report.html").read_text()


async def test_every_admitted_rollout_is_accounted_for(story: Story) -> None:
    accounts = dict(story.report["accounts"])
    admitted = accounts.pop("admitted")
    assert admitted == sum(accounts.values()) > 0
    assert (accounts["trained"], accounts["lost_with_redis"], accounts["in_flight"]) == (STEPS * 8, 0, 0)
    assert story.answers["before"]["run"]["alarms"] == []


async def test_two_versions_are_compared_on_the_same_prompts(story: Story) -> None:
    compared = story.answers["compare"]
    assert len(compared["samples"]) == 4
    assert set(compared["differences"]) == {"reward", "reward_stderr", "tokens", "distinct2", "kl"}
    gains = [row["right_reward"] - row["left_reward"] for row in compared["samples"]]
    assert compared["differences"]["reward"] == pytest.approx(sum(gains) / 4)
    assert compared["differences"]["kl"] != 0, "the weights differ"


async def test_a_promoted_version_is_marked_and_a_rollback_gives_its_weights_a_new_one(story: Story) -> None:
    rows = {row["version"]: row for row in story.answers["versions"]}
    assert (rows["1.1"]["promoted"], rows["1.1"]["reason"]) == (True, "reads well")
    assert story.answers["rollback"]["version"] == "2.2"
    assert f"2.{STEPS}" in rows, "it trained on from there"


async def test_a_call_for_more_processes_returns_when_clients_find_the_newcomer(story: Story) -> None:
    rewards = {row["name"]: row for row in story.answers["scale"] if row["name"].startswith("reward-")}
    assert {name: row["ready"] for name, row in rewards.items()} == {"reward-0": "yes", "reward-1": "yes"}
    addresses = [row["address"] for row in rewards.values()]
    assert story.answers["endpoints"]["reward"] == "ipv4:" + ",".join(addresses)


async def test_a_stop_is_clean(story: Story) -> None:
    assert story.exit_status == 0
    assert not (story.root / "out" / "mine" / "endpoints.json").exists()


async def test_no_process_connects_to_what_the_network_policies_do_not_know(story: Story) -> None:
    assert sorted(map(str, story.connections - OWN - ONLY_ON_ONE_MACHINE.keys())) == []


async def test_what_the_network_policies_are_for_is_really_opened(story: Story) -> None:
    assert sorted(map(str, OWN - NOT_ON_ONE_MACHINE.keys() - story.connections)) == []
