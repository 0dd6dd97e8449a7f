"""RewardService over real sockets, with tokens."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tests.unit.reward.support import TOKENIZER, FakeScorer, as_number, make_version, read_version

from honed.artifacts.promotions import PromotionRecord
from honed.kit.channel import connect
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.kit.tokens import TokenTable, ensure_local_tokens, read_token
from honed.reward.batching import BatchSettings, DynamicBatcher
from honed.reward.follower import RecordFollower
from honed.reward.promoter import Promoter
from honed.reward.registry import ScorerRegistry
from honed.reward.replicas import NoReplicas
from honed.reward.scorer import Scorer
from honed.reward.service import RewardService
from honed.reward.settings import ScorerSettings
from honed.reward.sources import ModelSources
from honed.v1 import common_pb2, generation_pb2, reward_pb2, reward_pb2_grpc

NAME = "honed.v1.RewardService"
BATCH = BatchSettings(max_tokens=64, max_wait_s=0.002, max_queued=32)


class Rig:
    """A serving RewardService whose scorer's versions are the names of directories."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.scorers: dict[str, FakeScorer] = {}
        for version in ("v0", "v1", "v2", "v3", "v4"):
            make_version(directory / version, version)
        settings = [
            ScorerSettings(name="rm", kind="reward_model", source=str(directory / "v1"), weight=2.0),
            ScorerSettings(name="aid", kind="function", source="aid", weight=-1.0),
        ]
        self.registry = ScorerRegistry(settings)
        store = str(directory / "store")
        self.sources = ModelSources(store, "r", directory / "copies", [directory])
        self.follower = RecordFollower(self.registry, self.sources, PromotionRecord(store, "r"), NoReplicas())
        self.batcher = DynamicBatcher(lambda: self.registry.serving, BATCH)

    def build(self, settings: ScorerSettings, source: str) -> Scorer:
        if settings.kind == "function":
            return FakeScorer("aid", "pkg 1", lambda text: 1.0 if text != "raise" else as_number(text))
        version = read_version(self.sources.local(source))
        return self.scorers.setdefault(version, FakeScorer("rm", version))

    async def serve(self) -> AsyncIterator[Rig]:
        ensure_local_tokens(self.directory / "tokens")
        await self.follower.start(self.build)
        service = RewardService(self.batcher, self.registry, Promoter(self.follower), lambda: TOKENIZER)
        servicer = Servicer(NAME, reward_pb2_grpc.add_RewardServiceServicer_to_server, service)
        options = ServerOptions(tokens=TokenTable.load(self.directory / "tokens" / "table.json"), drain_s=1.0)
        server = Server([Listener("127.0.0.1", 0, [servicer])], options)
        async with self.batcher.running():
            await server.start()
            async with self.channel(server, "operator") as channel, self.channel(server, "application") as application:
                self.stub: Any = reward_pb2_grpc.RewardServiceStub(channel)
                self.application: Any = reward_pb2_grpc.RewardServiceStub(application)
                yield self
            await server.stop()

    def channel(self, server: Server, token: str) -> grpc.aio.Channel:
        return connect(f"127.0.0.1:{server.ports[0]}", read_token(self.directory / "tokens" / f"{token}.token"))


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async for rig in Rig(tmp_path).serve():
        yield rig


def request(*responses: str) -> reward_pb2.ScoreRequest:
    return reward_pb2.ScoreRequest(items=[score_item(f"id-{text}", text) for text in responses])


def score_item(item_id: str, text: str) -> reward_pb2.ScoreItem:
    return reward_pb2.ScoreItem(id=item_id, text=text)


def load(rig: Rig, version: str) -> reward_pb2.LoadScorerRequest:
    return reward_pb2.LoadScorerRequest(name="rm", source=str(rig.directory / version))


def promote(version: str) -> reward_pb2.PromoteScorerRequest:
    return reward_pb2.PromoteScorerRequest(name="rm", version=version)


def page(token: str, size: int = 0) -> reward_pb2.ListScorersRequest:
    return reward_pb2.ListScorersRequest(page=common_pb2.PageRequest(page_size=size, page_token=token))


def status_of(error: grpc.aio.AioRpcError, kind: Callable[[], Any]) -> Any:
    """The error's detail of one kind."""

    class View:
        code, details, trailing_metadata = error.code, error.details, error.trailing_metadata

    detail = kind()
    return next(any_ for any_ in rpc_status.from_call(View).details if any_.Unpack(detail)) and detail


async def test_a_list_is_scored_in_its_order_with_each_scorers_value_and_version(rig: Rig) -> None:
    answer = await rig.application.Score(request("3", "4"), timeout=10)
    assert [(result.id, result.reward) for result in answer.results] == [("id-3", 2.0 * 3 - 1), ("id-4", 2.0 * 4 - 1)]
    assert list(answer.results[0].scores) == [
        common_pb2.Score(scorer="rm", scorer_version="v1", value=3.0, weight=2.0),
        common_pb2.Score(scorer="aid", scorer_version="pkg 1", value=1.0, weight=-1.0),
    ]


async def test_text_and_token_ids_are_the_same_response(rig: Rig) -> None:
    items = [
        reward_pb2.ScoreItem(id="a", prompt={"text": "p"}, text="12"),
        reward_pb2.ScoreItem(id="b", prompt={"token_ids": {"ids": b"p"}}, token_ids={"ids": b"12"}),
    ]
    answer = await rig.application.Score(reward_pb2.ScoreRequest(items=items), timeout=10)
    assert answer.results[0].reward == answer.results[1].reward == 23.0


async def test_callers_share_batches_and_a_scorer_that_raises_fails_one_caller(rig: Rig) -> None:
    calls = [rig.application.Score(request(str(i)), timeout=10) for i in range(20)]
    answers = await asyncio.gather(*calls, rig.application.Score(request("1", "raise"), timeout=10), return_exceptions=True)
    assert [answer.results[0].reward for answer in answers[:-1]] == [2.0 * i - 1 for i in range(20)]
    failed = answers[-1]
    assert failed.code() == grpc.StatusCode.INTERNAL
    assert "scorer 'rm' (v1) failed on sample 1: ValueError: told to" in failed.details()
    assert max(len(batch) for batch in rig.scorers["v1"].batches) > 1


async def test_a_value_that_is_not_finite_never_leaves(rig: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="not finite") as caught:
        await rig.application.Score(request("nan"), timeout=10)
    assert caught.value.code() == grpc.StatusCode.INTERNAL


async def test_an_item_without_a_response_is_named(rig: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.application.Score(reward_pb2.ScoreRequest(items=[score_item("a", "1"), {"id": "b"}]), timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    violations = status_of(caught.value, error_details_pb2.BadRequest).field_violations
    assert violations[0].field.startswith("items[1]")


async def test_overload_says_when_to_come_back(rig: Rig) -> None:
    scorer = rig.scorers["v1"]
    scorer.gate.clear()
    busy = asyncio.ensure_future(rig.application.Score(request("1"), timeout=10))
    assert await asyncio.to_thread(scorer.entered.wait, 10)
    waiting = asyncio.ensure_future(rig.application.Score(request(*"2" * 30), timeout=10))
    while rig.batcher.queued != 30:
        await asyncio.sleep(0.001)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.application.Score(request("1", "2", "3"), timeout=10)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert status_of(caught.value, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    scorer.gate.set()
    await asyncio.gather(busy, waiting)


async def test_a_stream_waits_for_room_and_answers_every_item_by_its_id(rig: Rig) -> None:
    sent = 500  # the queue holds 32

    async def items() -> AsyncIterator[reward_pb2.StreamScoreRequest]:
        for i in range(sent):
            yield reward_pb2.StreamScoreRequest(item=score_item(f"id-{i}", str(i)))

    answers = {a.result.id: a.result.reward async for a in rig.application.StreamScore(items(), timeout=30)}
    assert answers == {f"id-{i}": 2.0 * i - 1 for i in range(sent)}


async def test_a_stream_ends_with_the_first_failure_and_names_the_item(rig: Rig) -> None:
    call = rig.application.StreamScore(timeout=10)
    await call.write(reward_pb2.StreamScoreRequest(item=score_item("good", "1")))
    assert (await call.read()).result.id == "good"
    await call.write(reward_pb2.StreamScoreRequest(item=score_item("bad", "raise")))
    with pytest.raises(grpc.aio.AioRpcError, match="failed on sample 1"):
        await call.read()


async def test_an_item_of_a_stream_that_breaks_the_contract_is_the_callers_fault(rig: Rig) -> None:
    call = rig.application.StreamScore(timeout=10)
    await call.write(reward_pb2.StreamScoreRequest(item=score_item("good", "1")))
    assert (await call.read()).result.id == "good"
    await call.write(reward_pb2.StreamScoreRequest(item={"id": "bad"}))
    with pytest.raises(grpc.aio.AioRpcError, match="response") as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_scorer_that_is_out_of_order_is_told_from_one_that_is_wrong(rig: Rig) -> None:
    def away(text: str) -> float:
        raise ConnectionError("no route")

    rig.scorers["v1"]._value = away
    with pytest.raises(grpc.aio.AioRpcError, match="no route") as caught:
        await rig.application.Score(request("1", "2"), timeout=10)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def conversation(*turns: tuple[str, str]) -> generation_pb2.Prompt:
    messages = [generation_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    return generation_pb2.Prompt(messages=generation_pb2.ChatMessages(messages=messages))


async def test_a_prompt_of_messages_is_scored_by_the_policys_chat_template(rig: Rig) -> None:
    seen = rig.scorers["v1"]
    seen.sees = lambda sample: bytes(sample.prompt_ids).decode()
    item = reward_pb2.ScoreItem(id="chat", prompt=conversation(("system", "be brief"), ("user", "hello")), text="2")
    await rig.stub.Score(reward_pb2.ScoreRequest(items=[item]), timeout=10)
    assert seen.prompts[-1] == "s:be brief;u:hello;"


async def test_a_policy_without_a_chat_template_says_which_item_and_field(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TOKENIZER), "template", None)
    rig.scorers["v1"].sees = lambda sample: str(sample.prompt_ids)
    good = reward_pb2.ScoreItem(id="text", text="1")
    bad = reward_pb2.ScoreItem(id="chat", prompt=conversation(("user", "hello")), text="2")
    with pytest.raises(grpc.aio.AioRpcError, match=r"items\[1\]\.prompt\.messages: this model has no chat template") as caught:
        await rig.stub.Score(reward_pb2.ScoreRequest(items=[good, bad]), timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_version_is_loaded_and_promoted_in_the_middle_of_traffic_and_no_batch_mixes(rig: Rig) -> None:
    stop = asyncio.Event()
    seen: list[reward_pb2.ScoreResult] = []

    async def caller(start: int) -> None:
        count = start
        while not stop.is_set():
            answer = await rig.application.Score(request(str(count), str(count + 1)), timeout=10)
            seen.extend(answer.results)
            count += 100

    async with asyncio.TaskGroup() as group:
        for start in range(0, 16, 2):
            group.create_task(caller(start))
        for version in ("v2", "v3", "v4"):
            target = len(seen) + 100
            while len(seen) < target:
                await asyncio.sleep(0.001)
            loaded = await rig.stub.LoadScorer(load(rig, version), timeout=10)
            assert loaded.scorer.state == reward_pb2.SCORER_STATE_LOADED
            promoted = await rig.stub.PromoteScorer(promote(version), timeout=10)
            assert promoted.serving.state == reward_pb2.SCORER_STATE_SERVING
            assert promoted.replicas == 1
        target = len(seen) + 100
        while len(seen) < target:
            await asyncio.sleep(0.001)
        stop.set()
    # Each response was scored once, by the version that its score names: so each batch was one version's alone.
    for version, scorer in rig.scorers.items():
        scored = Counter(text for batch in scorer.batches for text in batch)
        named = Counter(r.id.removeprefix("id-") for r in seen if r.scores[0].scorer_version == version)
        assert scored == named
    assert {r.scores[0].scorer_version for r in seen} == {"v1", "v2", "v3", "v4"}


async def test_control_needs_its_own_scope(rig: Rig) -> None:
    for call in (
        rig.application.LoadScorer(load(rig, "v2"), timeout=10),
        rig.application.PromoteScorer(promote("x"), timeout=10),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=r"reward\.control"):
            await call


async def test_the_list_is_paged(rig: Rig) -> None:
    await rig.stub.LoadScorer(load(rig, "v0"), timeout=10)
    found, token = [], ""
    while True:
        answer = await rig.application.ListScorers(page(token, size=1), timeout=10)
        found += [(s.name, s.version, s.kind, s.weight, s.state) for s in answer.scorers]
        token = answer.next_page_token
        if not token:
            break
    assert found == [
        ("aid", "pkg 1", "reward_model", -1.0, reward_pb2.SCORER_STATE_SERVING),
        ("rm", "v0", "reward_model", 2.0, reward_pb2.SCORER_STATE_LOADED),
        ("rm", "v1", "reward_model", 2.0, reward_pb2.SCORER_STATE_SERVING),
    ]
    with pytest.raises(grpc.aio.AioRpcError, match=r"page\.page_token"):
        await rig.application.ListScorers(page("?"), timeout=10)


async def test_a_reference_reaches_the_scorer_with_its_item(rig: Rig) -> None:
    rig.scorers["v1"].sees = lambda sample: sample.reference
    items = [
        reward_pb2.ScoreItem(id="a", prompt={"text": "6 * 7", "reference": "42"}, text="1"),
        reward_pb2.ScoreItem(id="b", prompt={"text": "6 * 7"}, text="2"),
        reward_pb2.ScoreItem(id="c", text="3"),
    ]
    await rig.application.Score(reward_pb2.ScoreRequest(items=items), timeout=10)
    assert sorted(rig.scorers["v1"].prompts) == ["", "", "42"]


async def test_a_reference_that_is_too_long_is_refused(rig: Rig) -> None:
    item = reward_pb2.ScoreItem(id="a", prompt={"text": "p", "reference": "x" * 65_537}, text="1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.application.Score(reward_pb2.ScoreRequest(items=[item]), timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
