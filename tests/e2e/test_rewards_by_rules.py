"""A run that trains on a rule: what each prompt's reference asks is what its responses are scored by."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from tests.support.run import run_tree, settings_of, tapped, until

from honed.conductor.local import local_run
from honed.queue.connection import RedisLink

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]

ALWAYS, NEVER = "^", "(?!)"


async def test_a_reference_goes_from_the_prompts_file_into_the_reward_that_trains(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"token_ids": [100 + n, 50], "reference": ALWAYS if n % 2 else NEVER} for n in range(12)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorers = [
        {"name": "rule", "kind": "function", "source": "matches", "options": {"timeout_s": 0.5}},
        {"name": "words", "kind": "function", "source": "length", "weight": 0.0},
    ]
    tree = run_tree(
        tmp_path,
        reward={"scorers": scorers},
        conductor={"samples_per_prompt": 2},
        data={"prompts": str(prompts), "evaluation": {"prompts": str(prompts)}},
    )
    async with local_run(settings_of(tree)) as run, asyncio.timeout(200):
        executing = asyncio.ensure_future(run.execute())
        await until(lambda: run.state.loop_started_at or executing.done(), 120, "the loop begins")
        async with RedisLink(str(run.fleet.redis_url)) as link, tapped(link, run.settings.run) as tap:
            await executing
    asked = {tuple(row["token_ids"]): row["reference"] for row in rows}
    scored = list(tap.scored.values())
    assert len(scored) >= 8
    for each in scored:
        reference = asked[tuple(each.rollout.prompt_token_ids)]
        assert (each.rollout.reference, each.reward) == (reference, float(reference == ALWAYS))
    [version] = {score.scorer_version for each in scored for score in each.scores if score.scorer == "rule"}
    assert " options " in version
    assert run.state.alarms == {}
    assert run.evaluation.problem == ""
    wanted = [float(row["reference"] == ALWAYS) for row in rows]
    assert run.evaluation.rewards_before == run.evaluation.rewards_after == wanted, "samples of the evaluation have theirs too"
