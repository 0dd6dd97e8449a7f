"""Claims about services of two minor versions beside each other: one knows the released contract alone, the other is ours.

A proxy drops from each message what the release does not know, in both directions: to the learner it is an old generator, and
to the generator an old learner.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeVar

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from tests.integration.generation.conftest import Service
from tests.integration.generation.test_generate import ask
from tests.support.released import Released
from tests.unit.reward.support import TOKENIZER

from honed.artifacts.version import VersionId
from honed.generation.codec import Codec
from honed.generation.requests import Chunk, FinishReason, Span
from honed.kit.channel import connect
from honed.kit.tokens import read_token
from honed.learner.data.episode import Episode, TokenSpan, Vocabulary
from honed.learner.loop.push import Pusher
from honed.reward.messages import rollout_input, scored_message
from honed.reward.reward import Reward
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="session")

RELEASED = Released()
M = TypeVar("M", bound=Message)


@pytest_asyncio.fixture(loop_scope="session")
async def old(service: Service) -> AsyncIterator[tuple[Any, Any]]:
    """Stubs of both services, through a peer of the last release."""
    token = read_token(service.tokens / "operator.token")
    async with (
        RELEASED.before(service.public_address) as public,
        RELEASED.before(service.control_address) as control,
        connect(public, token) as channel,
        connect(control, token) as control_channel,
    ):
        yield (
            generation_pb2_grpc.GenerationServiceStub(channel),
            generation_pb2_grpc.GenerationControlServiceStub(control_channel),
        )


async def test_a_version_is_pushed_between_a_new_and_an_old_service(service: Service, old: tuple[Any, Any]) -> None:
    manifest = service.publish(1)

    async def generators() -> list[Any]:
        return [old[1]]

    report = await Pusher(generators, timeout_s=60).push(manifest)
    assert (report.committed, report.failures, len(report.pauses_s)) == (1, (), 1)
    assert await service.serving() == manifest.version


async def test_a_refused_version_is_refused_across_versions_too(service: Service, old: tuple[Any, Any]) -> None:
    manifest = service.publish(0, canaries_of=1)

    async def generators() -> list[Any]:
        return [old[1]]

    report = await Pusher(generators, timeout_s=60).push(manifest)
    assert report.refused


async def test_applications_are_answered_across_versions(old: tuple[Any, Any]) -> None:
    answer = await old[0].Generate(ask(max_tokens=6, fixed_length=True, seed=3, logprobs=True), timeout=30)
    assert len(answer.samples[0].token_ids) == len(answer.samples[0].logprobs) == 6
    request = generation_pb2.StreamGenerateRequest(prompt=ask().prompt, sampling=ask(max_tokens=6, fixed_length=True).sampling)
    assert sum([len(part.delta.token_ids) async for part in old[0].StreamGenerate(request, timeout=30)]) == 6
    policy = await old[0].GetPolicy(generation_pb2.GetPolicyRequest(), timeout=10)
    assert policy.version.run == "test"


async def test_what_came_after_the_release_is_missing_there(old: tuple[Any, Any]) -> None:
    """Otherwise the proxy would prove nothing."""
    messages = generation_pb2.Prompt(
        messages=generation_pb2.ChatMessages(messages=[generation_pb2.ChatMessage(role="user", content="hello")])
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await old[0].Generate(generation_pb2.GenerateRequest(prompt=messages), timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_entries_of_the_streams_keep_what_training_needs() -> None:
    """An old conductor's prompt, a rollout of an old generator, scored by an old reward service: the learner trains on it."""
    sampling = common_pb2.SamplingParams(max_tokens=3)
    task = less(
        common_pb2.PromptTask(
            group_id="g", run="test", prompt_token_ids=[5, 6], samples=1, sampling=sampling, source="train", reference="42"
        )
    )
    assert (task.source, task.reference) == ("", ""), "the release did not know them"
    spans = (Span(VersionId(1, 4), 0, 2), Span(VersionId(1, 5), 2, 3))
    chunk = Chunk((7, 8, 9), (-0.5, -1.0, -1.5), spans, "", FinishReason.LENGTH)
    rollout = less(Codec("test").rollout(task, 0, chunk))
    scored = less(common_pb2.ScoredRollout.FromString(scored_message(rollout, Reward(0.75, (), missing=True), "").body))
    assert not scored.missing, "the release did not know it"
    episode = Episode.from_scored("1-0", scored, Vocabulary(258, end_token_ids=frozenset({0})), max_tokens=5)
    assert episode == Episode(
        "g/0", "1-0", (5, 6), (7, 8, 9), (-0.5, -1.0, -1.5),
        (TokenSpan(VersionId(1, 4), 0, 2), TokenSpan(VersionId(1, 5), 2, 3)), 0.75, group_id="g", finish_reason="length",
    )  # fmt: skip


async def test_a_reference_goes_from_the_prompt_to_the_scorer() -> None:
    """An entry through an old generator has none, so that generators are the first to be replaced."""
    sampling = common_pb2.SamplingParams(max_tokens=3)
    task = common_pb2.PromptTask(group_id="g", run="test", prompt_token_ids=[5], samples=1, sampling=sampling, reference="42")
    chunk = Chunk((7,), (-0.5,), (Span(VersionId(1, 4), 0, 1),), "", FinishReason.LENGTH)
    rollout = Codec("test").rollout(task, 0, chunk)
    assert rollout_input(rollout, TOKENIZER).reference == "42"
    scored = common_pb2.ScoredRollout.FromString(scored_message(rollout, Reward(0.75, ()), "").body)
    assert scored.rollout.reference == "42"
    assert rollout_input(less(rollout), TOKENIZER).reference == ""


def less(message: M) -> M:
    """What a service of the last release hands on of an entry."""
    return type(message).FromString(RELEASED.through(message.SerializeToString(), message.DESCRIPTOR.full_name))
