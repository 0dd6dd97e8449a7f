"""A response without its truncation token, from the scoring worker over Redis to the learner's rewards."""

from __future__ import annotations

import asyncio

import pytest
from tests.unit.learner.samples import VOCABULARY, make_trainer
from tests.unit.reward.support import TOKENIZER, FakeScorer

from honed.artifacts.version import VersionId
from honed.learner.data.episode import Vocabulary
from honed.learner.objectives.kl import FixedKL
from honed.learner.objectives.normalise import FittedOnFirstBatch, GainBias
from honed.learner.sources.scored_stream import Intake, IntakeSettings
from honed.learner.sources.trained import TrainedIds
from honed.queue.connection import RedisLink
from honed.queue.holding import holding
from honed.queue.keys import ROLLOUTS, SCORED, RunKeys
from honed.queue.messages import Message
from honed.queue.stream import WorkQueue
from honed.reward.batching import BatchSettings, DynamicBatcher
from honed.reward.reward import Term, Truncation, WeightedSum
from honed.reward.worker import ScoringWorker
from honed.v1 import common_pb2

pytestmark = pytest.mark.redis


def rollout(number: int, response: str) -> Message:
    version = common_pb2.PolicyVersion(run="r", fence=0, step=0)
    body = common_pb2.Rollout(
        rollout_id=f"r-{number}/0",
        run="r",
        prompt_token_ids=b"#",
        response_token_ids=response.encode(),
        logprobs=[-3.9] * len(response),
        version_spans=[common_pb2.VersionSpan(version=version, start=0, end=len(response))],
        sampling=common_pb2.SamplingParams(temperature=1.0),
    )
    return Message(body.rollout_id, body.SerializeToString())


async def test_the_price_of_a_missing_token_is_what_the_learner_trains_on_and_fits_nothing(
    link: RedisLink, keys: RunKeys
) -> None:
    """M10: with scores around -12 a price of -1 would become the best reward of all, if it were normalised with them."""
    scorer = FakeScorer(value=lambda text: -10.0 - text.count("!"))
    reward = WeightedSum([Term(scorer, 1.0)], Truncation.of_text(".", 0, -1.0, TOKENIZER))
    await WorkQueue(link, keys, ROLLOUTS, "generation").put(
        [rollout(number, text) for number, text in enumerate(["!.", "!!.!!", "!!!", "!!!!.", "!"])]
    )
    stopping, batcher = asyncio.Event(), DynamicBatcher(lambda: reward, BatchSettings(64, 0.001, 128))
    own = WorkQueue(link, keys, SCORED, "learner-1")
    async with asyncio.timeout(60), batcher.running(), holding(own) as hold:
        worker = ScoringWorker(WorkQueue(link, keys, ROLLOUTS, "w"), batcher, TOKENIZER, group_size=16)
        working = asyncio.ensure_future(worker.run(stopping))
        intake = Intake(own, hold, Vocabulary(VOCABULARY), IntakeSettings(max_staleness=0), TrainedIds("r"))
        episodes = [held.episode for held in await intake.collect(5, 0)]
        stopping.set()
        await working
        await intake.close()
    by_id = {episode.rollout_id: (episode.missing, episode.reward) for episode in episodes}
    assert list(dict(sorted(by_id.items())).values()) == [
        (False, -11.0),
        (False, -12.0),
        (True, -1.0),
        (False, -14.0),
        (True, -1.0),
    ]
    normaliser, alone = FittedOnFirstBatch(GainBias()), FittedOnFirstBatch(GainBias())
    stats = make_trainer(kl=FixedKL(0.0), normaliser=normaliser).update(episodes, version=VersionId(0, 0))
    alone([episode.reward for episode in episodes if not episode.missing])
    assert normaliser.state() == alone.state(), "the scores alone set gain and bias"
    # The three scores have mean 0 then; the two prices go in as they are.
    assert stats["reward_mean"] == pytest.approx((3 * 0.0 + 2 * -1.0) / 5, abs=1e-6)
