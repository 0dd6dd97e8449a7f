"""A RewardService as a scorer of another: honed's own over real sockets, with tokens and TLS, and services that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.authority import Authority
from tests.unit.reward.support import TOKENIZER, FakeScorer, item

from honed.artifacts.promotions import PromotionRecord
from honed.kit.errors import FailedPrecondition
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.kit.tls import TlsFiles
from honed.kit.tokens import TokenTable, ensure_local_tokens
from honed.reward.batching import BatchSettings, DynamicBatcher
from honed.reward.follower import RecordFollower
from honed.reward.promoter import Promoter
from honed.reward.registry import ScorerRegistry
from honed.reward.remote_scorer import RemoteScorer
from honed.reward.replicas import NoReplicas
from honed.reward.scorer import BadSample, ScorerFailed, ScorerInput, is_outage
from honed.reward.service import RewardService
from honed.reward.settings import RemoteOptions, ScorerSettings
from honed.reward.sources import ModelSources
from honed.v1 import common_pb2, reward_pb2, reward_pb2_grpc


class Remote:
    """A RewardService of honed with two scorers of fixed versions."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.scorer = FakeScorer("rm", "v1")
        settings = [
            ScorerSettings(name="rm", kind="function", source="rm", weight=2.0),
            ScorerSettings(name="aid", kind="function", source="aid", weight=-1.0),
        ]
        self.registry = ScorerRegistry(settings)
        store = str(directory / "store")
        record, sources = PromotionRecord(store, "r"), ModelSources(store, "r", directory / "copies", [directory])
        self.follower = RecordFollower(self.registry, sources, record, NoReplicas())
        self.batcher = DynamicBatcher(lambda: self.registry.serving, BatchSettings(max_queued=1024))

    def build(self, settings: ScorerSettings, source: str) -> FakeScorer:
        return self.scorer if settings.name == "rm" else FakeScorer("aid", "pkg 1", lambda text: float(len(text)))

    @asynccontextmanager
    async def serving(self, tls: TlsFiles | None = None) -> AsyncIterator[str]:
        ensure_local_tokens(self.directory / "tokens")
        await self.follower.start(self.build)
        service = RewardService(self.batcher, self.registry, Promoter(self.follower), lambda: TOKENIZER)
        servicer = Servicer("honed.v1.RewardService", reward_pb2_grpc.add_RewardServiceServicer_to_server, service)
        options = ServerOptions(tokens=TokenTable.load(self.directory / "tokens" / "table.json"), drain_s=1.0, tls=tls)
        server = Server([Listener("127.0.0.1", 0, [servicer])], options)
        async with self.batcher.running():
            await server.start()
            yield f"localhost:{server.ports[0]}"
            await server.stop()


class Foreign(reward_pb2_grpc.RewardServiceServicer):
    """Somebody's own service: `answer` is all that it does."""

    def __init__(self, answer: Callable[[reward_pb2.ScoreRequest, grpc.ServicerContext], reward_pb2.ScoreResponse]) -> None:
        self.answer, self.requests = answer, list[reward_pb2.ScoreRequest]()

    def Score(self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        self.requests.append(request)
        return self.answer(request, context)


@contextmanager
def serving(service: Any, add: Callable[[Any, grpc.Server], None] | None = None) -> Iterator[str]:
    """gRPC's own server with its own limits: messages of 4 MiB."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    if service is not None:
        (add or reward_pb2_grpc.add_RewardServiceServicer_to_server)(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def lengths(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
    return reward_pb2.ScoreResponse(
        results=[reward_pb2.ScoreResult(id=each.id, reward=len(each.text or each.token_ids.ids)) for each in request.items]
    )


def remote(target: str, *, sees_prompt: bool = True, **options: Any) -> RemoteScorer:
    return RemoteScorer("there", target, RemoteOptions.model_validate({"deadline_s": 30.0, **options}), sees_prompt=sees_prompt)


def token(directory: Path) -> Path:
    return directory / "tokens" / "application.token"


async def test_the_weighted_sum_there_is_the_score_here_and_one_scorer_can_be_chosen(tmp_path: Path) -> None:
    there = Remote(tmp_path)
    async with there.serving() as target:
        whole, one = remote(target, token_file=token(tmp_path)), remote(target, token_file=token(tmp_path), scorer="rm")
        batch = [item("3"), item(list(b"44"), list(b"p"))]
        outputs = await asyncio.to_thread(whole.score, batch)
        assert [output.value for output in outputs] == [2.0 * 3 - 1, 2.0 * 44 - 2]
        single = await asyncio.to_thread(one.score, batch)
        assert [(output.value, output.version) for output in single] == [(3.0, "v1"), (44.0, "v1")]
        there.scorer.version = "v2"
        later = await asyncio.to_thread(whole.score, batch)
        assert {o.version for o in outputs} != {o.version for o in later}, "the version is of what scores there now"
        assert len({o.version for o in later}) == 1
        assert await asyncio.to_thread(whole.scorers, 5.0) == ["aid", "rm"]
        unknown = remote(target, token_file=token(tmp_path), scorer="humour")
        with pytest.raises(ScorerFailed, match=r"has no scorer 'humour' \(options.scorer\): rm, aid"):
            await asyncio.to_thread(unknown.score, batch)


async def test_without_the_right_token_it_says_what_to_do_and_a_replaced_one_is_read_again(tmp_path: Path) -> None:
    async with Remote(tmp_path).serving() as target:
        with pytest.raises(ScorerFailed, match=r"UNAUTHENTICATED: .*options\.token_file") as caught:
            await asyncio.to_thread(remote(target).score, [item("3")])
        assert is_outage(caught.value), "no rollout is at fault"
        file = tmp_path / "mine"
        file.write_text("honed_wrong\n")
        scorer = remote(target, token_file=file)
        with pytest.raises(ScorerFailed, match="UNAUTHENTICATED"):
            await asyncio.to_thread(scorer.score, [item("3")])
        file.write_text(token(tmp_path).read_text())
        assert (await asyncio.to_thread(scorer.score, [item("3")]))[0].value == 5.0


async def test_the_channel_is_of_the_houses_mutual_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    there, here = authority.issue("there"), authority.issue("here")
    tls = {name: str(getattr(here, name)) for name in ("authority", "certificate", "key")}
    async with Remote(tmp_path).serving(there) as target:
        secured = remote(target, token_file=token(tmp_path), tls=tls)
        assert (await asyncio.to_thread(secured.score, [item("3")]))[0].value == 5.0
        plain = remote(target, token_file=token(tmp_path), deadline_s=0.5)
        with pytest.raises(ScorerFailed) as caught:
            await asyncio.to_thread(plain.score, [item("3")])
        assert is_outage(caught.value)


async def test_a_sample_that_the_service_refuses_is_at_fault_only_when_it_was_sent_alone(tmp_path: Path) -> None:
    async with Remote(tmp_path).serving() as target:
        scorer = remote(target, token_file=token(tmp_path))
        too_long = item("1" * (5 << 20))
        with pytest.raises(BadSample, match=r"answered INVALID_ARGUMENT: items\[0\]"):
            await asyncio.to_thread(scorer.score, [too_long])
        with pytest.raises(ScorerFailed, match=r"failed: .*told to") as caught:
            await asyncio.to_thread(scorer.score, [item("1"), item("raise")])
        assert not isinstance(caught.value, BadSample)
        assert not is_outage(caught.value)


def test_a_batch_goes_in_calls_that_any_server_takes() -> None:
    service = Foreign(lengths)
    with serving(service) as target:
        batch = [item("x" * (1 << 20)) for _ in range(5)] + [item("y") for _ in range(7)]
        outputs = remote(target, batch=4).score(batch)
    assert [output.value for output in outputs] == [float(1 << 20)] * 5 + [1.0] * 7
    assert [len(request.items) for request in service.requests] == [2, 2, 4, 4]
    assert [each.id for request in service.requests for each in request.items] == [str(index) for index in range(12)]
    assert outputs[0].version == f"remote {target}", "a service that names no scorers has no version to tell"


def test_a_sample_is_sent_as_text_or_as_tokens_with_its_prompt_and_reference() -> None:
    service = Foreign(lengths)
    sample = ScorerInput(TOKENIZER, (256, *b"ask"), response_tokens=tuple(b"42"), reference="42")
    with serving(service) as target:
        for options in ({}, {"send": "token_ids"}, {"sees_prompt": False}):
            remote(target, **options).score([sample])
    text, tokens, blind = (request.items[0] for request in service.requests)
    assert (text.prompt.text, text.text, text.prompt.reference) == ("ask", "42", "42")
    assert (list(tokens.prompt.token_ids.ids), list(tokens.token_ids.ids)) == ([256, *b"ask"], list(b"42"))
    assert (blind.prompt.WhichOneof("content"), blind.prompt.text, blind.prompt.reference) == ("text", "", "42")


def test_what_passes_is_tried_again_within_the_deadline() -> None:
    tries = []

    def third_time(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        tries.append(1)
        if len(tries) < 3:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
        return lengths(request, context)

    with serving(Foreign(third_time)) as target:
        assert remote(target).score([item("abc")])[0].value == 3.0
    assert len(tries) == 3


@pytest.mark.parametrize("there", [True, False])
def test_a_service_that_does_not_answer_in_time_is_an_outage(there: bool) -> None:
    def full(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")

    with serving(Foreign(full)) as target:
        if there:
            with pytest.raises(ScorerFailed, match=r"did not score within 0\.5 s: RESOURCE_EXHAUSTED: no room") as caught:
                remote(target, deadline_s=0.5).score([item("abc")])
    if not there:
        with pytest.raises(ScorerFailed, match=r"did not score within 0\.5 s: (UNAVAILABLE|DEADLINE_EXCEEDED)") as caught:
            remote(target, deadline_s=0.5).score([item("abc")])
    assert is_outage(caught.value)


def test_a_hanging_service_costs_the_deadline_once_for_all_calls_of_a_batch() -> None:
    now = [0.0]
    asked: list[int] = []

    def slow(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        asked.append(len(request.items))
        now[0] += 4.0
        return lengths(request, context)

    with serving(Foreign(slow)) as target:
        options = RemoteOptions(deadline_s=10.0, batch=1)
        scorer = RemoteScorer("there", target, options, clock=lambda: now[0], sleep=lambda _: None)
        with pytest.raises(ScorerFailed, match=r"did not score within 10 s: the calls before took its time") as caught:
            scorer.score([item("a")] * 5)
    assert is_outage(caught.value)
    assert asked == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda results: results[:1], "gave 1 results for 2 items; does it speak another version"),
        (lambda results: results[::-1], "gave the id '1' for item '0'"),
        (lambda results: [results[0], reward_pb2.ScoreResult(id="1", reward=float("nan"))], "gave nan, which is not finite"),
    ],
)
def test_an_answer_that_is_none_is_refused(change: Callable[[list[Any]], list[Any]], reason: str) -> None:
    def wrong(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        return reward_pb2.ScoreResponse(results=change(list(lengths(request, context).results)))

    with serving(Foreign(wrong)) as target, pytest.raises(ScorerFailed, match=reason) as caught:
        remote(target).score([item("a"), item("b")])
    assert not is_outage(caught.value)


def test_a_server_without_the_contract_is_named_as_such() -> None:
    with (
        serving(None) as target,
        pytest.raises(ScorerFailed, match=r"serves no honed\.v1\.RewardService, or another version") as caught,
    ):
        remote(target).score([item("a")])
    assert is_outage(caught.value)


def test_the_version_tells_weights_scorers_and_their_versions_apart() -> None:
    made_of = [[("a", "1", 1.0)], [("a", "2", 1.0)], [("a", "1", 2.0)], [("a", "1", 1.0), ("b", "1", 1.0)]]
    now = [made_of[0]]

    def scored(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        response = lengths(request, context)
        for name, version, weight in now[0]:
            response.results[0].scores.append(common_pb2.Score(scorer=name, scorer_version=version, weight=weight))
        return response

    with serving(Foreign(scored)) as target:
        versions = set()
        for now[0] in made_of:
            versions.add(remote(target).score([item("a")])[0].version)
        now[0] = made_of[3][::-1]
        versions.add(remote(target).score([item("a")])[0].version)
    assert len(versions) == len(made_of), "the order says nothing"


def test_files_that_cannot_be_read_are_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"scorer 'there': token file .* does not exist"):
        remote("localhost:1", token_file=tmp_path / "none")
