"""The main job in small, on real vLLM: the product's own path from `local_run` to the last committed version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from tests.support.run import Tap, check_books, run_tree, settings_of, tapped, until
from tests.support.tiny import load, token_logprobs

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.conductor.local import local_run
from honed.conductor.run import Run
from honed.kit.channel import connect
from honed.kit.tokens import read_token
from honed.learner.loop.journal import read_pushes, read_updates
from honed.learner.loop.records import PushRecord, UpdateRecord
from honed.queue.connection import RedisLink
from honed.v1 import common_pb2, conductor_pb2, generation_pb2, generation_pb2_grpc

pytestmark = [pytest.mark.vllm, pytest.mark.redis, pytest.mark.timeout(420), pytest.mark.asyncio(loop_scope="module")]

STEPS, BATCH, STALENESS, TOKENS = 10, 16, 2, 72


@dataclass
class Application:
    """Somebody who generates all through the loop."""

    answers: list[generation_pb2.GenerateResponse] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    async def call_for_ever(self, target: str, token: str) -> None:
        async with connect(target, token) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            while True:
                request = generation_pb2.GenerateRequest(
                    prompt=generation_pb2.Prompt(text="people said"),
                    sampling=common_pb2.SamplingParams(max_tokens=TOKENS, seed=len(self.answers), fixed_length=True),
                    logprobs=True,
                )
                try:
                    self.answers.append(await stub.Generate(request, timeout=60))
                except grpc.aio.AioRpcError as error:
                    self.errors.append(f"{error.code().name}: {error.details()}")
                    await asyncio.sleep(0.1)


@dataclass
class Finished:
    """A run that has done its steps and still serves."""

    run: Run
    tap: Tap
    application: Application
    policy: generation_pb2.GetPolicyResponse
    steps: list[UpdateRecord]
    pushes: list[PushRecord]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def finished(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Finished]:
    root = tmp_path_factory.mktemp("loop")
    tree = run_tree(
        root,
        generation={"engine": "vllm", "rollout_concurrency": 24, "max_num_seqs": 32, "kv_cache_gib": 0.1},
        learner={"batch": BATCH, "steps": STEPS, "max_staleness": STALENESS},
        conductor={"response_tokens": TOKENS},
    )
    async with local_run(settings_of(tree)) as run, asyncio.timeout(360):
        application = Application()
        executing = asyncio.ensure_future(run.execute())
        await until(lambda: run.state.loop_started_at or executing.done(), 240, "the loop begins")
        async with RedisLink(str(run.fleet.redis_url)) as link, tapped(link, run.settings.run) as tap:
            token = read_token(run.settings.tokens_directory / "application.token")
            calling = [asyncio.create_task(application.call_for_ever(run.settings.generation.target, token)) for _ in "ab"]
            await executing
            async with connect(run.settings.generation.target, token) as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                policy = await stub.GetPolicy(generation_pb2.GetPolicyRequest(), timeout=10)
            for task in calling:
                task.cancel()
            await asyncio.wait(calling)
        learner = run.workspace.learner
        yield Finished(run, tap, application, policy, read_updates(learner), read_pushes(learner))


async def test_every_version_is_published_and_committed_in_its_turn(finished: Finished) -> None:
    assert finished.run.state.phase == conductor_pb2.RUN_PHASE_FINISHED
    labels = [f"1.{step}" for step in range(1, STEPS + 1)]
    assert [push.version for push in finished.pushes] == labels
    assert [push.failures for push in finished.pushes] == [[]] * STEPS
    assert [len(push.pauses_s) for push in finished.pushes] == [1] * STEPS
    store = PolicyStore(finished.run.settings.policy_url, finished.run.settings.run)
    assert [version.label for version in store.versions()] == ["0.0", *labels]
    assert (finished.policy.version.fence, finished.policy.version.step) == (1, STEPS)


async def test_what_was_produced_trained_once_or_was_dropped_for_a_reason(finished: Finished) -> None:
    reasons = check_books(finished.run.state.stages, finished.steps)
    assert sum(len(step.rollout_ids) for step in finished.steps) == STEPS * BATCH
    assert set(reasons) <= {"stale", "run_finished"}


async def test_nothing_staler_than_the_bound_trained(finished: Finished) -> None:
    assert [step.step for step in finished.steps] == list(range(1, STEPS + 1))
    assert max(step.values["staleness_max"] for step in finished.steps) <= STALENESS
    for step in finished.steps:  # counted again from the rollouts themselves
        for rollout in step.rollout_ids:
            oldest = min(span.version.step for span in finished.tap.rollouts[rollout].version_spans)
            assert step.step - 1 - oldest <= STALENESS


async def test_no_push_failed_a_request(finished: Finished) -> None:
    assert finished.application.errors == []
    assert len(finished.application.answers) >= 2
    assert finished.policy.samples_failed == 0


async def test_each_tokens_log_probability_is_its_labelled_versions_own(finished: Finished) -> None:
    """Under transformers in float32, from the weights in the policy store, for responses that span pushes and all others.

    Rollouts seldom do since they start late: they are done before the push. Two applications ask all the time.
    """
    settings = finished.run.settings
    root = Path(settings.policy_url) / settings.run

    @cache
    def logprobs(version: VersionId, tokens: tuple[int, ...]) -> list[float]:
        return token_logprobs(model(version), tokens)

    @cache
    def model(version: VersionId):  # type: ignore[no-untyped-def]
        return load(root / version.label)

    def worst(prompt: Sequence[int], sample: common_pb2.Rollout | generation_pb2.Sample, response: Sequence[int]) -> float:
        tokens = (*prompt, *response)
        errors = []
        for span in sample.version_spans:
            own = logprobs(VersionId(span.version.fence, span.version.step), tokens)
            at = len(prompt) - 1
            errors += [abs(own[at + i] - sample.logprobs[i]) for i in range(span.start, span.end)]
        assert len(errors) == len(response) == len(sample.logprobs) == TOKENS
        return max(errors)

    rollouts = list(finished.tap.rollouts.values())
    trained = {rollout for step in finished.steps for rollout in step.rollout_ids}
    assert trained <= finished.tap.rollouts.keys()
    answers = [(answer.prompt_token_ids, sample) for answer in finished.application.answers for sample in answer.samples]
    spanning = [sample for sample in (*rollouts, *(sample for _, sample in answers)) if len(sample.version_spans) > 1]
    assert len(spanning) >= STEPS, "too few responses saw a push to prove anything"
    assert max(worst(r.prompt_token_ids, r, r.response_token_ids) for r in rollouts) < 1e-4
    assert max(worst(prompt, sample, sample.token_ids) for prompt, sample in answers) < 1e-4
