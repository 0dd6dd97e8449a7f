"""The feeder on a real Redis: it never hangs, and no id ever names two prompts, whatever Redis or the processes do."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.conductor.fake_loop import FakeLoop, NumberFile
from tests.integration.queue.servers import Server
from tests.support.tiny import make_tokenizer

from honed.conductor.feeder import Feeder
from honed.conductor.prompts import PromptMix
from honed.conductor.settings import ConductorSettings, PromptMixSettings
from honed.conductor.submission import submit_prompts
from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.models.prompts import PromptEncoder
from honed.queue.admission import AdmissionPolicy
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.inbox import PromptInbox
from honed.queue.keys import PROMPTS, SCORED, STAGES, SUBMITTED, RunKeys
from honed.queue.lease import Leases
from honed.queue.messages import Message
from honed.queue.progress import LearnerProgress, ProgressBoard
from honed.queue.stream import WorkQueue
from honed.v1 import conductor_pb2, generation_pb2

pytestmark = pytest.mark.redis

_RUNS = itertools.count(1)
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def keys() -> RunKeys:
    return RunKeys(f"run-{next(_RUNS)}")


@pytest.fixture
async def link(server: Server) -> AsyncIterator[RedisLink]:
    async with RedisLink(server.url, retry=RetryPolicy(deadline_s=10)) as link:
        yield link


def check(loop: FakeLoop, feeder: Feeder, *, may_lose: int = 0) -> None:
    """At the end of a run: each rollout trained at most once and fresh, and each one accounted for.

    What Redis lost need not be lost: the learner may have had it in hand.
    """
    assert [name for name, count in Counter(name for name, _ in loop.trained).items() if count > 1] == []
    assert len(loop.trained) == (loop.steps or 0) * loop.batch
    assert max(age for _, age in loop.trained) <= loop.max_staleness
    accounts = feeder.accounts
    assert balanced(feeder)
    assert accounts.trained == len(loop.trained)
    assert accounts.in_flight == 0
    assert accounts.lost_with_redis <= may_lose


def balanced(feeder: Feeder) -> bool:
    by_name = feeder.accounts.by_name()
    return by_name.pop("admitted") == sum(by_name.values()) and min(by_name.values()) >= 0


async def finish(loop: FakeLoop, feeder: Feeder) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await loop.finished.wait()
        while (await feeder.look(), feeder.depths.in_flight)[1]:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("checkpoint_every", [1, 4])
async def test_a_checkpoint_rarer_than_the_update_does_not_hold_the_run_up(
    link: RedisLink, keys: RunKeys, checkpoint_every: int, samples: int
) -> None:
    loop = FakeLoop(link, keys, checkpoint_every=checkpoint_every, samples=samples, max_staleness=2)
    async with loop.workers(), loop.learner(), loop.feeder() as feeder:
        await finish(loop, feeder)
    check(loop, feeder)
    assert feeder.accounts.dropped.keys() <= {"run_finished"}


@pytest.mark.parametrize("samples", [3, 8])
async def test_with_no_staleness_and_groups_that_do_not_fit_the_gap_the_run_goes_on(
    link: RedisLink, keys: RunKeys, samples: int
) -> None:
    loop = FakeLoop(
        link, keys, batch=2 * samples, samples=samples, max_staleness=0, refuse=lambda name: name.endswith(("3/1", "6/0"))
    )
    async with loop.workers(), loop.learner(), loop.feeder() as feeder:
        await finish(loop, feeder)
    check(loop, feeder)
    assert feeder.accounts.dropped["refused"] > 0


async def test_no_more_runs_at_once_than_may(link: RedisLink, keys: RunKeys) -> None:
    loop = FakeLoop(link, keys, batch=16, steps=3)
    async with loop.learner(), loop.feeder(max_in_flight=5) as feeder:
        async with asyncio.timeout(PATIENCE_S):
            while feeder.admitted < 5:
                await asyncio.sleep(0.005)
        for _ in range(20):
            assert not await feeder.step()
        assert feeder.depths.prompts == 5


async def test_without_a_word_of_the_learner_nothing_is_admitted(link: RedisLink, keys: RunKeys) -> None:
    loop = FakeLoop(link, keys)
    async with loop.feeder() as feeder:
        for _ in range(5):
            assert not await feeder.step()
        assert feeder.admitted == 0


async def test_the_accounts_add_up_at_every_instant(link: RedisLink, keys: RunKeys) -> None:
    loop = FakeLoop(link, keys, checkpoint_every=3, samples=2, steps=30, refuse=lambda name: name.endswith("5/1"))
    looks = 0
    async with loop.workers(), loop.learner(), loop.feeder() as feeder, asyncio.timeout(PATIENCE_S):
        while not loop.finished.is_set():
            await feeder.look()
            accounts = feeder.accounts
            assert balanced(feeder), accounts
            assert accounts.lost_with_redis == 0, accounts
            assert accounts.in_flight <= feeder.depths.in_flight, "for a moment entries of a checkpoint still stand there"
            looks += 1
            await asyncio.sleep(0)
        await finish(loop, feeder)
    assert looks > 50
    check(loop, feeder)


async def test_a_learner_that_is_killed_again_and_again_ends_its_steps(link: RedisLink, keys: RunKeys) -> None:
    loop = FakeLoop(link, keys, checkpoint_every=4, steps=14, seconds=0.002)
    async with loop.workers(), loop.feeder() as feeder, asyncio.timeout(PATIENCE_S):
        for update in (3, 6, 7, 11):
            async with loop.learner():
                await loop.at_update(update).wait()
        async with loop.learner():
            await finish(loop, feeder)
    check(loop, feeder)


async def test_a_conductor_that_is_killed_goes_on_without_skipping_or_repeating_a_prompt(
    link: RedisLink, keys: RunKeys
) -> None:
    loop = FakeLoop(link, keys, steps=16, seconds=0.002)
    async with loop.workers(), loop.learner(), asyncio.timeout(PATIENCE_S):
        for update in (2, 5, 9):
            async with loop.feeder():
                await loop.at_update(update).wait()
        async with loop.feeder() as feeder:
            await finish(loop, feeder)
    check(loop, feeder)
    turns = feeder.admitted
    assert sorted(loop.prompts.values()) == [(1, turn // 250, turn % 250) for turn in range(turns)]
    assert set(loop.prompts) == {f"{keys.run}-{turn}" for turn in range(turns)}


@pytest.mark.parametrize("checkpoint_every", [1, 4])
async def test_a_redis_that_is_emptied_in_the_middle_costs_time_only(
    link: RedisLink, keys: RunKeys, checkpoint_every: int
) -> None:
    loop = FakeLoop(link, keys, steps=24, seconds=0.005, checkpoint_every=checkpoint_every)
    async with loop.workers(), loop.learner(), loop.feeder() as feeder, asyncio.timeout(PATIENCE_S):
        for update in (6, 13):
            await loop.at_update(update).wait()
            await link.command("FLUSHALL")
            assert balanced(feeder)
        await finish(loop, feeder)
    check(loop, feeder, may_lose=2 * 3 * loop.batch)


async def test_a_redis_that_is_emptied_while_the_conductor_is_away_reuses_no_id(link: RedisLink, keys: RunKeys) -> None:
    loop = FakeLoop(link, keys, steps=20, seconds=0.005)
    async with loop.workers(), loop.learner(), asyncio.timeout(PATIENCE_S):
        async with loop.feeder() as before:
            await loop.at_update(8).wait()
        highest, skipped = before.cursor.position, before.cursor.skipped
        await link.command("FLUSHALL")
        async with loop.feeder() as feeder:
            await finish(loop, feeder)
    check(loop, feeder, may_lose=6 * loop.batch)
    assert feeder.cursor.skipped > skipped, "turns that the predecessor may have admitted are left out"
    assert feeder.cursor.position > highest


@pytest.mark.parametrize("back", [1, 50])
async def test_a_cursor_that_is_set_back_reuses_no_turn(link: RedisLink, keys: RunKeys, back: int) -> None:
    loop = FakeLoop(link, keys, steps=24, seconds=0.003)
    async with loop.workers(), loop.learner(), loop.feeder() as feeder, asyncio.timeout(PATIENCE_S):
        await loop.at_update(10).wait()
        at = int(await link.command("HGET", keys.cursor(), "position"))
        await link.command("HSET", keys.cursor(), "position", at - back)
        await finish(loop, feeder)
    check(loop, feeder)


async def test_a_redis_that_lost_its_last_moments_trains_nothing_twice(link: RedisLink, keys: RunKeys) -> None:
    loop = FakeLoop(link, keys, steps=24, seconds=0.005, checkpoint_every=2)
    names = [keys.cursor(), *(key(stage) for stage in STAGES for key in (keys.stream, keys.tally, keys.dead))]
    async with loop.workers(), loop.learner(), loop.feeder() as feeder, asyncio.timeout(PATIENCE_S):
        await loop.at_update(8).wait()
        # All keys at one instant, and put back at another: as a failover or a cut append-only file leaves them.
        async with link.redis.pipeline(transaction=True) as pipe:
            for name in names:
                pipe.dump(name)
            dumps = await pipe.execute()
        await loop.at_update(12).wait()
        async with link.redis.pipeline(transaction=True) as pipe:
            pipe.delete(*names)
            for name, dump in zip(names, dumps, strict=True):
                if dump is not None:
                    pipe.restore(name, 0, dump)
            await pipe.execute()
        await finish(loop, feeder)
    check(loop, feeder, may_lose=6 * loop.batch)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        yield server


async def test_redis_is_killed_and_started_again_in_the_middle(own_server: Server) -> None:
    async with RedisLink(own_server.url, retry=RetryPolicy(deadline_s=20, cap_s=0.2)) as link:
        loop = FakeLoop(link, RunKeys("killed"), steps=24, seconds=0.01, checkpoint_every=3)
        async with loop.workers(), loop.learner(), loop.feeder() as feeder, asyncio.timeout(60):
            await loop.at_update(8).wait()
            await asyncio.to_thread(own_server.kill)
            await asyncio.to_thread(own_server.start)
            await finish(loop, feeder)
    assert [name for name, count in Counter(name for name, _ in loop.trained).items() if count > 1] == []
    assert len(loop.trained) == 24 * loop.batch
    assert balanced(feeder)


async def test_a_step_that_nobody_heard_of_leaves_its_turns_out_and_skips_no_prompt(link: RedisLink, keys: RunKeys) -> None:
    loop = FakeLoop(link, keys, steps=6)
    async with loop.learner(), loop.feeder() as feeder:
        async with asyncio.timeout(PATIENCE_S):
            while not feeder.admitted:
                await asyncio.sleep(0.005)
        feeder._attempted += 7  # as after an outage in the middle of a step that did not happen
        await feeder.look()
        assert feeder.cursor.skipped == 7
        admitted = feeder.admitted
        async with loop.workers():
            await finish(loop, feeder)
    check(loop, feeder)
    assert sorted(loop.prompts.values()) == [(1, 0, number) for number in range(feeder.admitted)]
    assert f"{keys.run}-{admitted}" not in loop.prompts
    assert (await link.command("HGET", keys.tally(PROMPTS), "came_in")) == str(feeder.admitted).encode()


async def test_submitted_prompts_take_their_share_and_each_is_trained_on_once(
    link: RedisLink, keys: RunKeys, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path)
    loop = FakeLoop(link, keys, steps=12)
    settings = ConductorSettings(prompt_mix=PromptMixSettings(submitted=1.0))
    encoder = PromptEncoder.of_model(tmp_path, longest=40)
    mix = PromptMix(keys.run, NumberFile(), encoder, 0, settings)  # type: ignore[arg-type]
    inbox = PromptInbox(link, keys)
    request = conductor_pb2.SubmitPromptsRequest(
        prompts=[generation_pb2.Prompt(text=f"submitted {number}", reference=str(number)) for number in range(20)],
        idempotency_key="once",
    )
    for _ in range(2):
        assert (await submit_prompts(request, inbox, encoder, settings.prompt_mix)).waiting == 20
    assert [one.prompt.reference for one in await inbox.peek(SUBMITTED, 3)] == ["0", "1", "2"]
    async with loop.workers(), loop.learner(), loop.feeder(mix) as feeder:
        await finish(loop, feeder)
    check(loop, feeder)
    assert loop.sources.count("submitted") == 20
    first = loop.sources[:40].count("submitted")
    assert 15 <= first <= 20, "while they last, one in two"
    submitted = [prompt for prompt in loop.prompts.values() if len(prompt) > 3]
    assert len(set(submitted)) == 20
    assert feeder.figures["prompts_submitted_waiting"] == 0


async def test_a_submission_with_a_prompt_that_cannot_be_used_names_it_and_adds_none(
    link: RedisLink, keys: RunKeys, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path)
    encoder, inbox = PromptEncoder.of_model(tmp_path, longest=8), PromptInbox(link, keys)
    texts = [generation_pb2.Prompt(text="short"), generation_pb2.Prompt(text="much too long")]
    request = conductor_pb2.SubmitPromptsRequest(prompts=texts)
    with pytest.raises(InvalidArgument, match=r"prompts\[1\]\.text: has 13 tokens"):
        await submit_prompts(request, inbox, encoder, PromptMixSettings())
    with pytest.raises(FailedPrecondition, match=r"prompt_mix\.submitted is 0"):
        await submit_prompts(request, inbox, encoder, PromptMixSettings(submitted=0))
    assert await inbox.peek(SUBMITTED, 10) == []


async def test_unsaved_rollouts_that_went_with_redis_make_no_room_for_more(link: RedisLink, keys: RunKeys) -> None:
    loop, board = FakeLoop(link, keys, batch=8), ProgressBoard(link, keys)
    scored = WorkQueue(link, keys, SCORED, "test")
    said = LearnerProgress(fence=1, update=3, served=3, unsaved=24, turn=24)
    await board.write(said)
    async with Leases(link, keys).held("conductor", "me", 5_000) as lease:
        feeder = Feeder(link, keys, lease, loop.mix(), AdmissionPolicy(8, 2, 1000), steps=None)
        await scored.put([Message(f"{keys.run}-{turn}/0", b"") for turn in range(24)])
        assert (await feeder.step(), feeder.depths.scored) == (True, 0)
        await feeder.look()
        await link.command("FLUSHALL")
        await feeder.step()
        await board.write(said)
        await scored.put([Message(f"{keys.run}-{turn}/0", b"") for turn in range(100, 116)])
        await feeder.step()
        assert feeder.depths.scored == 16, "these wait; the 24 that had trained are gone"
        await board.write(replace(said, unsaved=32, update=4, served=4))
        await feeder.look()
        assert feeder.depths.scored == 8, "8 of those that wait have trained"
        await board.write(replace(said, unsaved=8, update=5, served=5))
        await feeder.look()
        assert feeder.depths.scored == 8, "after a checkpoint the learner's count is right again"


async def test_waiting_prompts_that_cannot_be_used_do_not_hold_up_the_others(
    link: RedisLink, keys: RunKeys, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path)
    loop = FakeLoop(link, keys, batch=4, steps=1)
    settings = ConductorSettings(prompt_mix=PromptMixSettings(file=0.0))
    mix = PromptMix(keys.run, None, PromptEncoder.of_model(tmp_path, longest=8), 0, settings)
    inbox = PromptInbox(link, keys)
    await inbox.submit([generation_pb2.Prompt(text="much too long")] * 1000, limit=2000)
    await inbox.submit([generation_pb2.Prompt(text=f"short {number}") for number in range(4)], limit=2000)
    async with loop.workers(), loop.learner(), loop.feeder(mix) as feeder:
        await finish(loop, feeder)
    assert (feeder.refused, feeder.admitted) == (1000, 4)
    check(loop, feeder)
