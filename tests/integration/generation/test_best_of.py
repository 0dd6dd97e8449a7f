"""Best-of-n over real sockets: the generation service samples, a real reward service scores, and the best come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from tests.integration.generation.conftest import FENCE, LIMITS, Service, refused
from tests.support.run import until
from tests.unit.reward.support import FakeScorer

from honed.artifacts.promotions import PromotionRecord
from honed.config import RunSettings
from honed.generation.best_of import BestOf
from honed.generation.main import PUBLIC
from honed.generation.scoring import CandidateScoring
from honed.generation.service import GenerationService
from honed.kit.channel import connect
from honed.kit.scopes import LOCAL_TOKENS
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.kit.tokens import TokenTable, read_token
from honed.models.tokenizer import load_tokenizer
from honed.reward.batching import BatchSettings, DynamicBatcher
from honed.reward.follower import RecordFollower
from honed.reward.promoter import Promoter
from honed.reward.registry import ScorerRegistry
from honed.reward.replicas import NoReplicas
from honed.reward.service import RewardService
from honed.reward.settings import ScorerSettings
from honed.reward.sources import ModelSources
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc, reward_pb2, reward_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="session")

IDS = [10, 20, 30, 40]
WEIGHTS = {"size": 1.0, "plain": -3.0}
SCORERS = tuple({"name": name, "kind": "function", "source": name, "weight": weight} for name, weight in WEIGHTS.items())
REWARD = "honed.v1.RewardService"


def size_of(text: str) -> float:
    return float(len(text.encode()))


def plain(text: str) -> float:
    return float(sum(letter.isascii() for letter in text))


class Reward:
    """A reward service with two scorers whose answers a test can hold back."""

    def __init__(self, service: Service, directory: Path) -> None:
        self.size = FakeScorer("size", "1", size_of)
        self.plain = FakeScorer("plain", "1", plain)
        settings = [ScorerSettings.model_validate(scorer) for scorer in SCORERS]
        self._registry = ScorerRegistry(settings)
        self.batcher = DynamicBatcher(lambda: self._registry.serving, BatchSettings(max_wait_s=0.001, max_queued=4))
        store = str(directory / "store")
        sources = ModelSources(store, "test", directory / "copies", [directory])
        self._follower = RecordFollower(self._registry, sources, PromotionRecord(store, "test"), NoReplicas())
        self._tokenizer = load_tokenizer(service.models[0])
        self.tokens = service.tokens

    def servicer(self) -> RewardService:
        return RewardService(self.batcher, self._registry, Promoter(self._follower), lambda: self._tokenizer)

    async def load(self) -> None:
        await self._follower.start(lambda settings, _: getattr(self, settings.name))


@asynccontextmanager
async def serving(name: str, add: Callable[..., Any], servicer: Any, tokens: Path) -> AsyncIterator[str]:
    options = ServerOptions(tokens=TokenTable.load(tokens / "table.json"), drain_s=1.0)
    server = Server([Listener("127.0.0.1", 0, [Servicer(name, add, servicer)])], options)
    await server.start()
    await server.ready()
    try:
        yield f"127.0.0.1:{server.ports[0]}"
    finally:
        await server.stop()


@dataclass
class Chooser:
    """A generation service beside the one of the session, on its engine, that calls a reward service of the test."""

    service: Service
    reward: Reward
    reward_address: str
    stack: AsyncExitStack

    async def stub(self, address: str | None = None, scorers: Any = SCORERS, **generation: Any) -> Any:
        """As an application calls it; other settings give another service."""
        reward = {"scorers": scorers, "address": self.reward_address if address is None else address or None}
        tokens = self.service.tokens
        settings = RunSettings.model_validate({"security": {"tokens": tokens}, "reward": reward, "generation": generation})
        scoring = CandidateScoring(settings)
        servicer = GenerationService(self.service.frontend, BestOf(self.service.frontend, scoring))
        self.stack.push_async_callback(scoring.close)
        add = generation_pb2_grpc.add_GenerationServiceServicer_to_server
        at = await self.stack.enter_async_context(serving(PUBLIC, add, servicer, tokens))
        channel = await self.stack.enter_async_context(connect(at, read_token(tokens / "application.token")))
        return generation_pb2_grpc.GenerationServiceStub(channel)


@pytest_asyncio.fixture(loop_scope="session")
async def chooser(service: Service, tmp_path: Path) -> AsyncIterator[Chooser]:
    reward = Reward(service, tmp_path)
    await reward.load()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(reward.batcher.running())
        add = reward_pb2_grpc.add_RewardServiceServicer_to_server
        at = await stack.enter_async_context(serving(REWARD, add, reward.servicer(), service.tokens))
        yield Chooser(service, reward, at, stack)
        for scorer in (reward.size, reward.plain):
            scorer.gate.set()


def ask(
    candidates: int = 0, scorer: str = "", *, kind: Any = generation_pb2.GenerateRequest, reference: str = "", **more: Any
) -> Any:
    named = {name: more.pop(name) for name in ("n", "logprobs") if name in more}
    prompt = generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=IDS), reference=reference)
    sampling = common_pb2.SamplingParams(**{"seed": 5, "max_tokens": 12, **more})
    best = generation_pb2.BestOf(candidates=candidates, scorer=scorer) if candidates else None
    return kind(prompt=prompt, sampling=sampling, best_of=best, **named)


def as_sampled(sample: Any) -> Any:
    """A sample without what it is worth."""
    bare = generation_pb2.Sample()
    bare.CopyFrom(sample)
    bare.ClearField("reward")
    bare.ClearField("scores")
    return bare


@pytest.mark.parametrize("scorer", ["", "size", "plain"])
async def test_the_winners_are_the_most_valued_of_the_same_samples_best_first(chooser: Chooser, scorer: str) -> None:
    stub = await chooser.stub()
    every = (await stub.Generate(ask(n=4, logprobs=True), timeout=30)).samples
    answer = await stub.Generate(ask(4, scorer, n=3, logprobs=True), timeout=30)
    decode = chooser.service.frontend.engine.decode
    size, ascii_ = ([of(decode(s.token_ids)) for s in every] for of in (size_of, plain))
    reward = [WEIGHTS["size"] * a + WEIGHTS["plain"] * b for a, b in zip(size, ascii_, strict=True)]
    deciding = {"": reward, "size": size, "plain": ascii_}[scorer]
    assert len(set(deciding)) > 1, "otherwise any order would do"
    expected = sorted(range(4), key=lambda i: (-deciding[i], i))[:3]
    assert [sample.index for sample in answer.samples] == expected
    # Seeds, log-probabilities and version spans are those of the same sample of a plain request.
    assert [as_sampled(sample) for sample in answer.samples] == [every[i] for i in expected]
    assert [sample.version_spans[0].version.fence for sample in answer.samples] == [FENCE] * 3
    assert [sample.reward for sample in answer.samples] == pytest.approx([reward[i] for i in expected])
    for sample in answer.samples:
        values = {score.scorer: (score.value, score.weight) for score in sample.scores}
        i = sample.index
        assert values == {"size": (size[i], WEIGHTS["size"]), "plain": (ascii_[i], WEIGHTS["plain"])}
    assert list(answer.prompt_token_ids) == IDS


async def test_without_best_of_a_sample_has_no_reward(chooser: Chooser) -> None:
    [sample] = (await (await chooser.stub()).Generate(ask(), timeout=30)).samples
    assert not sample.HasField("reward")
    assert list(sample.scores) == []


async def test_a_stream_sends_each_winner_whole_the_best_first(chooser: Chooser) -> None:
    stub = await chooser.stub()
    whole = (await stub.Generate(ask(4, "size", n=2, logprobs=True), timeout=30)).samples
    stream = stub.StreamGenerate(ask(4, "size", n=2, logprobs=True, kind=generation_pb2.StreamGenerateRequest), timeout=30)
    assert [answer.delta async for answer in stream] == list(whole)


async def test_scorers_see_the_reference_of_the_prompt(chooser: Chooser) -> None:
    chooser.reward.size.sees = lambda sample: sample.reference
    await (await chooser.stub()).Generate(ask(3, reference="42"), timeout=30)
    assert chooser.reward.size.prompts == ["42"] * 3


@pytest.mark.parametrize(
    ("request_", "field", "says"),
    [
        (ask(2, n=3), "n", "among 2 candidates"),
        (ask(LIMITS.max_samples + 1), "best_of.candidates", "cap of 4"),
        (ask(257), "best_of.candidates", "256"),
        (ask(2, "charm"), "best_of.scorer", "there is no scorer 'charm'; there are plain, size"),
        (generation_pb2.GenerateRequest(prompt={"text": "a"}, best_of={}), "best_of.candidates", "1"),
    ],
)
async def test_a_bad_field_is_named(chooser: Chooser, request_: Any, field: str, says: str) -> None:
    code, text, details = await refused((await chooser.stub()).Generate(request_, timeout=30))
    assert code == grpc.StatusCode.INVALID_ARGUMENT, text
    assert [v.field for d in details if isinstance(d, error_details_pb2.BadRequest) for v in d.field_violations] == [field]
    assert says in text


async def test_what_a_scorer_cannot_score_is_the_requests_fault(chooser: Chooser) -> None:
    from honed.reward.scorer import BadSample

    def lacking(text: str) -> float:
        raise BadSample("size", "1", "the prompt has no reference")

    chooser.reward.size._value = lacking
    code, text, _ = await refused((await chooser.stub()).Generate(ask(2), timeout=30))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "best_of" in text
    assert "the prompt has no reference" in text


async def test_a_run_without_a_reward_says_so(chooser: Chooser) -> None:
    code, text, _ = await refused((await chooser.stub(scorers=())).Generate(ask(2), timeout=30))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "reward.scorers" in text
    code, text, _ = await refused((await chooser.stub(address="")).Generate(ask(2), timeout=30))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "reward.address" in text


async def test_a_reward_service_that_is_down_costs_no_sampling(chooser: Chooser) -> None:
    stub = await chooser.stub(address="127.0.0.1:1")
    before = chooser.service.frontend.tokens
    code, text, _ = await refused(stub.Generate(ask(2), timeout=30))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert "the reward service at 127.0.0.1:1" in text
    assert chooser.service.frontend.tokens == before
    assert (await stub.Generate(ask(n=2), timeout=30)).samples, "all else is served"


async def test_a_reward_service_that_has_loaded_nothing_is_not_there_yet(chooser: Chooser, tmp_path: Path) -> None:
    loading = Reward(chooser.service, tmp_path / "loading")
    add = reward_pb2_grpc.add_RewardServiceServicer_to_server
    at = await chooser.stack.enter_async_context(serving(REWARD, add, loading.servicer(), chooser.service.tokens))
    code, text, _ = await refused((await chooser.stub(address=at)).Generate(ask(2), timeout=30))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert "loaded no scorer yet" in text


async def test_a_slow_reward_service_has_its_own_deadline_and_the_callers(chooser: Chooser) -> None:
    stub = await chooser.stub(scoring_timeout_s=0.3)
    chooser.reward.size.gate.clear()
    code, text, _ = await refused(stub.Generate(ask(2), timeout=30))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "generation.scoring_timeout_s" in text
    patient = await chooser.stub()
    code, text, _ = await refused(patient.Generate(ask(2), timeout=0.5))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "scoring_timeout_s" not in text


async def test_a_caller_that_leaves_ends_the_scoring(chooser: Chooser) -> None:
    stub, size = await chooser.stub(), chooser.reward.size
    size.gate.clear()
    first = asyncio.ensure_future(stub.Generate(ask(2), timeout=30))
    await until(size.entered.is_set, 60, "the first call's candidates are being scored")
    call = stub.Generate(ask(3, seed=90), timeout=30)
    sending = asyncio.ensure_future(call.code())
    await until(lambda: chooser.reward.batcher.queued == 3, 60, "the second call's candidates wait")
    call.cancel()
    await sending
    await asyncio.sleep(0.1)  # the cancellation goes through two services
    size.gate.set()
    await first
    await stub.Generate(ask(1, seed=7), timeout=30)
    assert [len(batch) for batch in size.batches] == [2, 1], "what nobody waits for is not scored"


async def test_a_caller_that_leaves_ends_the_sampling(chooser: Chooser) -> None:
    stub, frontend = await chooser.stub(), chooser.service.frontend
    call = stub.Generate(ask(4, max_tokens=64, fixed_length=True), timeout=30)
    sending = asyncio.ensure_future(call.code())
    await until(lambda: frontend.engine.in_flight == 4, 60, "four are in flight", every_s=0.001)
    call.cancel()
    await sending
    await until(lambda: frontend.engine.in_flight == 0, 60, "nothing is in flight")
    assert chooser.reward.size.batches == []


async def test_candidates_count_against_the_queue_of_applications(chooser: Chooser) -> None:
    stub, control = await chooser.stub(), chooser.service.control
    await control.Pause(generation_pb2.PauseRequest(), timeout=10)
    waiting = asyncio.ensure_future(stub.Generate(ask(4), timeout=30))
    await until(lambda: chooser.service.frontend.engine.in_flight == 4, 60, "four are in flight")
    code, _, details = await refused(stub.Generate(ask(3), timeout=10))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert any(isinstance(detail, error_details_pb2.RetryInfo) for detail in details)
    await control.Resume(generation_pb2.ResumeRequest(), timeout=10)
    assert len((await waiting).samples) == 1


async def test_a_full_reward_service_is_waited_for_and_told_of_at_the_end(chooser: Chooser) -> None:
    hasty, stub, size = await chooser.stub(scoring_timeout_s=2.0), await chooser.stub(), chooser.reward.size
    size.gate.clear()
    calls = [asyncio.ensure_future(stub.Generate(ask(2), timeout=30))]
    await until(size.entered.is_set, 60, "the first call's candidates are being scored")
    calls.append(asyncio.ensure_future(stub.Generate(ask(4), timeout=30)))
    await until(lambda: chooser.reward.batcher.queued == 4, 60, "the queue is full")
    code, text, details = await refused(hasty.Generate(ask(2), timeout=30))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED, text
    assert any(isinstance(detail, error_details_pb2.RetryInfo) for detail in details)
    calls.append(asyncio.ensure_future(stub.Generate(ask(3), timeout=30)))
    await until(lambda: chooser.service.frontend.engine.in_flight == 0, 60, "the third call's candidates are sampled")
    size.gate.set()
    assert [len((await call).samples) for call in calls] == [1, 1, 1]


class Promoting(reward_pb2_grpc.RewardServiceServicer):
    """Promotes a scorer in the middle of its first answer."""

    def __init__(self) -> None:
        self.calls = 0

    async def ListScorers(self, request: Any, context: Any) -> reward_pb2.ListScorersResponse:
        return reward_pb2.ListScorersResponse(scorers=[{"name": "size", "state": reward_pb2.SCORER_STATE_SERVING}])

    async def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
        self.calls += 1
        answer = reward_pb2.ScoreResponse()
        for index, item in enumerate(request.items):
            version = "2" if index or self.calls > 1 else "1"
            value = {"1": 100.0, "2": float(index)}[version]
            answer.results.add(id=item.id, reward=value, scores=[{"scorer": "size", "scorer_version": version, "value": value}])
        return answer


async def test_candidates_are_compared_by_one_version_of_each_scorer(chooser: Chooser) -> None:
    promoting, add = Promoting(), reward_pb2_grpc.add_RewardServiceServicer_to_server
    at = await chooser.stack.enter_async_context(serving(REWARD, add, promoting, chooser.service.tokens))
    answer = await (await chooser.stub(address=at)).Generate(ask(3), timeout=30)
    assert [sample.index for sample in answer.samples] == [2]
    assert promoting.calls == 2


async def test_an_older_token_table_is_named(chooser: Chooser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from honed.kit.tokens import table_text

    monkeypatch.setitem(LOCAL_TOKENS, "generation", ())
    table = {name: read_token(chooser.service.tokens / f"{name}.token") for name in LOCAL_TOKENS}
    (tmp_path / "table.json").write_text(table_text(table))
    add = reward_pb2_grpc.add_RewardServiceServicer_to_server
    at = await chooser.stack.enter_async_context(serving(REWARD, add, chooser.reward.servicer(), tmp_path))
    code, text, _ = await refused((await chooser.stub(address=at)).Generate(ask(2), timeout=30))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "scope `reward`" in text
