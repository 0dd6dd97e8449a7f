"""Dynamic batching, with a scorer that waits until the test lets it go."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
from tests.unit.reward.support import FakeScorer, item

from honed.kit.errors import DeadlineExceeded, InvalidArgument, Overloaded, Unavailable
from honed.reward.batching import BatchSettings, DynamicBatcher
from honed.reward.reward import Reward, Term, WeightedSum
from honed.reward.scorer import ScorerFailed, ScorerInput, ScorerOutput

SETTINGS = BatchSettings(max_tokens=1000, max_wait_s=0.02, max_queued=100, compute_timeout_s=30)


def batcher(scorer: FakeScorer, settings: BatchSettings = SETTINGS) -> DynamicBatcher:
    return DynamicBatcher(lambda: WeightedSum([Term(scorer, 1.0)]), settings)


def numbers(*values: float) -> list[ScorerInput]:
    return [item(str(float(value))) for value in values]


def values(rewards: Sequence[object]) -> list[float]:
    return [reward.value for reward in rewards if isinstance(reward, Reward)]


async def entered(scorer: FakeScorer) -> None:
    """Returns when the scorer is in a batch."""
    assert await asyncio.to_thread(scorer.entered.wait, 10)
    scorer.entered.clear()


async def queued(batcher: DynamicBatcher, count: int) -> None:
    """Lets the loop turn until so many items wait."""
    while batcher.queued != count:
        await asyncio.sleep(0)


async def test_callers_share_a_batch_and_each_gets_its_own_results() -> None:
    scorer = FakeScorer()
    async with batcher(scorer).running() as running:
        calls = [running.score(numbers(10 * i, 10 * i + 1, 10 * i + 2)) for i in range(20)]
        answers = await asyncio.gather(*calls)
    assert [values(rewards) for rewards in answers] == [[10.0 * i, 10.0 * i + 1, 10.0 * i + 2] for i in range(20)]
    assert len(scorer.batches) == 1


async def test_a_full_batch_does_not_wait_and_no_batch_passes_its_tokens() -> None:
    scorer = FakeScorer()
    patient = BatchSettings(max_tokens=4, max_wait_s=3600, max_queued=100)
    async with batcher(scorer, patient).running() as running:
        await running.score(numbers(*range(8)))  # "1.0" is one token by the estimate
    assert [len(batch) for batch in scorer.batches] == [4, 4]


async def test_an_item_larger_than_a_batch_goes_alone() -> None:
    scorer = FakeScorer()
    async with batcher(scorer, BatchSettings(max_tokens=2, max_wait_s=0.001)).running() as running:
        await running.score([item("1"), item("2" * 90), item("3")])
    assert [len(batch) for batch in scorer.batches] == [1, 1, 1]


async def test_a_bad_item_fails_its_own_caller_only_and_is_tried_twice() -> None:
    scorer = FakeScorer()
    async with batcher(scorer).running() as running:
        good, bad, other = await asyncio.gather(
            running.score(numbers(1, 2)), running.score([item("raise")]), running.score(numbers(3)), return_exceptions=True
        )
    assert isinstance(good, list)
    assert isinstance(other, list)
    assert (values(good), values(other)) == ([1.0, 2.0], [3.0])
    assert isinstance(bad, ScorerFailed)
    assert sum(batch.count("raise") for batch in scorer.batches) == 2


async def test_a_value_that_is_not_finite_fails_its_own_item_only() -> None:
    async with batcher(FakeScorer()).running() as running:
        first, second, third = await running.score_each([item("1"), item("nan"), item("3")])
    assert isinstance(second, ScorerFailed)
    assert values([first, third]) == [1.0, 3.0]


async def test_a_batch_keeps_the_versions_that_it_started_with() -> None:
    old, new = FakeScorer(version="old"), FakeScorer(version="new")
    serving = [WeightedSum([Term(old, 1.0)])]
    old.gate.clear()
    async with DynamicBatcher(lambda: serving[0], SETTINGS).running() as running:
        before = asyncio.ensure_future(running.score_each([*numbers(1), item("raise"), *numbers(2)]))
        await entered(old)
        serving[0] = WeightedSum([Term(new, 1.0)])
        after = asyncio.ensure_future(running.score(numbers(3)))
        await queued(running, 1)
        old.gate.set()
        first, failed, second = await before
        [third] = await after
    assert isinstance(failed, ScorerFailed)
    assert [reward.scores[0].version for reward in (first, second, third) if isinstance(reward, Reward)] == [
        "old",
        "old",
        "new",
    ]


async def test_beyond_the_bound_a_caller_is_told_when_to_come_back() -> None:
    scorer = FakeScorer()
    async with batcher(scorer, BatchSettings(max_tokens=10, max_wait_s=0.001, max_queued=10)).running() as running:
        await running.score(numbers(0))
        scorer.entered.clear()
        scorer.gate.clear()
        busy = asyncio.ensure_future(running.score(numbers(1)))
        await entered(scorer)
        waiting = asyncio.ensure_future(running.score(numbers(*range(8))))
        await queued(running, 8)
        with pytest.raises(Overloaded, match="8 items wait to be scored and 10 may; 3 more do not fit") as caught:
            await running.score(numbers(1, 2, 3))
        assert 0 < caught.value.retry_after_s <= 30
        patient = asyncio.ensure_future(running.score_each(numbers(1, 2, 3), patient=True))
        scorer.gate.set()
        assert values(await patient) == [1.0, 2.0, 3.0]
        await asyncio.gather(busy, waiting)


async def test_applications_that_come_again_at_once_do_not_keep_a_patient_caller_out() -> None:
    """They refilled the queue after each batch, and no rollout of the training was ever scored."""
    scorer = FakeScorer()
    scorer.gate.clear()
    turns = 0

    async def ask_for_ever() -> None:
        nonlocal turns
        while True:
            try:
                await running.score(numbers(1, 2))
                turns += 1
            except Overloaded:
                await asyncio.sleep(0)

    settings = BatchSettings(max_tokens=2, max_wait_s=0.001, max_queued=8)
    async with batcher(scorer, settings).running() as running, asyncio.timeout(20):
        applications = [asyncio.ensure_future(ask_for_ever()) for _ in range(10)]
        await queued(running, 8)
        patient = asyncio.ensure_future(running.score_each(numbers(*range(6)), patient=True))
        await asyncio.sleep(0)
        scorer.gate.set()
        assert values(await patient) == [float(value) for value in range(6)]
        served = turns
        while turns < served + 10:  # and applications go on
            await asyncio.sleep(0)
        for application in applications:
            application.cancel()
        await asyncio.gather(*applications, return_exceptions=True)


async def test_a_patient_caller_who_leaves_keeps_no_places() -> None:
    scorer = FakeScorer()
    scorer.gate.clear()
    async with batcher(scorer, BatchSettings(max_tokens=2, max_wait_s=0.001, max_queued=8)).running() as running:
        busy = asyncio.ensure_future(running.score(numbers(1, 2)))
        await entered(scorer)
        waiting = asyncio.ensure_future(running.score(numbers(*range(6))))
        await queued(running, 6)
        patient = asyncio.ensure_future(running.score_each(numbers(1, 2, 3, 4), patient=True))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="10 items wait to be scored and 8 may; 1 more do not fit"):
            await running.score(numbers(1))
        patient.cancel()
        await asyncio.wait([patient])
        late = asyncio.ensure_future(running.score(numbers(1)))
        await queued(running, 7)
        scorer.gate.set()
        await asyncio.gather(busy, waiting, late)


async def test_more_than_the_queue_can_ever_hold_is_a_wrong_request() -> None:
    async with batcher(FakeScorer(), BatchSettings(max_queued=3)).running() as running:
        with pytest.raises(InvalidArgument, match="items: 4 items"):
            await running.score(numbers(1, 2, 3, 4))
        assert values(await running.score_each(numbers(1, 2, 3), patient=True)) == [1.0, 2.0, 3.0]


async def test_items_of_a_caller_who_left_are_not_scored() -> None:
    scorer = FakeScorer()
    scorer.gate.clear()
    async with batcher(scorer).running() as running:
        busy = asyncio.ensure_future(running.score(numbers(1)))
        await entered(scorer)
        leaving, staying = (asyncio.ensure_future(running.score(numbers(n))) for n in (2, 3))
        await queued(running, 2)
        leaving.cancel()
        scorer.gate.set()
        await asyncio.gather(busy, staying)
    assert scorer.batches == [["1.0"], ["3.0"]]


async def test_at_the_end_those_who_wait_are_told_to_go_elsewhere() -> None:
    scorer = FakeScorer()
    scorer.gate.clear()
    async with batcher(scorer).running() as running:
        computing = asyncio.ensure_future(running.score(numbers(1)))
        await entered(scorer)
        waiting = asyncio.ensure_future(running.score(numbers(2)))
        await queued(running, 1)
    for call in (computing, waiting, running.score(numbers(3))):
        with pytest.raises(Unavailable):
            await call
    scorer.gate.set()


async def test_a_scorer_that_hangs_ends_the_service_and_not_the_process() -> None:
    scorer = FakeScorer()
    scorer.gate.clear()
    short = BatchSettings(max_wait_s=0, compute_timeout_s=0.05)

    async def serve() -> None:
        async with batcher(scorer, short).running() as running:
            with pytest.raises(Unavailable):
                await running.score(numbers(1))
            await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded, match=r"longer than 0\.05 s"):
        await serve()
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "scoring")
    scorer.gate.set()


async def test_an_empty_call_is_answered_at_once() -> None:
    async with batcher(FakeScorer()).running() as running:
        assert await running.score([]) == []


async def test_no_output_is_lost_when_calls_come_all_the_time() -> None:
    class Echo(FakeScorer):
        def score(self, batch: Sequence[ScorerInput]) -> list[ScorerOutput]:
            return [ScorerOutput(float(sample.response_text)) for sample in batch]

    async with batcher(Echo(), BatchSettings(max_tokens=16, max_wait_s=0.0005, max_queued=4096)).running() as running:

        async def caller(start: int) -> list[float]:
            return [value for i in range(20) for value in values(await running.score(numbers(start + i)))]

        answers = await asyncio.gather(*(caller(100 * n) for n in range(50)))
    assert answers == [[100.0 * n + i for i in range(20)] for n in range(50)]
