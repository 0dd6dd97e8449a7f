"""The service over gRPC, behind the interceptor that every service has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tests.support.judgements import full, pair

from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.preference.group_commit import GroupOptions
from honed.preference.service import ImportBatch, PreferenceService
from honed.preference.store import PreferenceStore, StoreOptions
from honed.v1 import preference_pb2 as pb
from honed.v1 import preference_pb2_grpc

Stub = preference_pb2_grpc.PreferenceServiceStub


@pytest.fixture
async def stub(store: PreferenceStore) -> AsyncIterator[Stub]:
    async for made in serve(store):
        yield made


async def serve(store: PreferenceStore) -> AsyncIterator[Stub]:
    service = PreferenceService(store, ImportBatch(judgements=10))
    add = preference_pb2_grpc.add_PreferenceServiceServicer_to_server
    listener = Listener("127.0.0.1", 0, [Servicer("honed.v1.PreferenceService", add, service)])
    server = Server([listener], ServerOptions(drain_s=1))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports[0]}") as channel:
            yield Stub(channel)
    finally:
        await server.stop()


def requests(numbers: Iterable[int]) -> list[pb.ImportJudgementsRequest]:
    return [pb.ImportJudgementsRequest(judgement=pair(n), idempotency_key=f"k{n}") for n in numbers]


def bad_field(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return bad.field_violations[0].field
    raise AssertionError(f"no field named in {status}")


async def test_a_judgement_goes_in_and_comes_out(stub: Stub) -> None:
    request = pb.RecordJudgementRequest(judgement=full(), idempotency_key="key")
    assert await stub.RecordJudgement(request) == pb.RecordJudgementResponse(id=1)
    assert await stub.RecordJudgement(request) == pb.RecordJudgementResponse(id=1, duplicate=True)
    (exported,) = [response.judgement async for response in stub.ExportJudgements(pb.ExportJudgementsRequest())]
    assert exported.id == 1
    exported.ClearField("id")
    assert exported == full()


BAD: dict[str, tuple[str, Callable[[pb.Judgement], object]]] = {
    "an index past the responses": ("judgement.pairwise.preferred", lambda j: setattr(j.pairwise, "preferred", 3)),
    "the same response twice": ("judgement.pairwise", lambda j: setattr(j.pairwise, "preferred", j.pairwise.other)),
    "one response for a pair": (
        "judgement.responses",
        lambda j: j.responses.__delitem__(slice(1, 3)),
    ),
    "too few ranks": ("judgement.ranking.ranks", lambda j: j.ranking.ranks.extend((0, 1))),
    "a rating of nothing": ("judgement.rating.response", lambda j: j.rating.MergeFrom(pb.RatingJudgement(response=9, high=1))),
    "a rating off its scale": ("judgement.rating", lambda j: j.rating.MergeFrom(pb.RatingJudgement(value=2, high=1))),
    "a thumb for nothing": ("judgement.thumbs.response", lambda j: setattr(j.thumbs, "response", 3)),
    "a flag without a reason": ("judgement.flag.reason", lambda j: setattr(j.flag, "response", 1)),
    "an unknown place in the order": ("judgement.shown_order[2]", lambda j: j.shown_order.__setitem__(2, 9)),
    "nobody": ("judgement.annotator", lambda j: setattr(j, "annotator", "")),
    "no source": ("judgement.source", lambda j: setattr(j, "source", "")),
    "a NUL in the source": ("judgement.source", lambda j: setattr(j, "source", "a\0b")),
    "a NUL in a label": ("judgement.labels[split]", lambda j: j.labels.__setitem__("split", "\0")),
    "no verdict": ("judgement.verdict", lambda j: j.ClearField("pairwise")),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_bad_field_is_named(stub: Stub, what: str) -> None:
    field, spoil = BAD[what]
    judgement = full()
    spoil(judgement)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.RecordJudgement(pb.RecordJudgementRequest(judgement=judgement, idempotency_key="key"))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert bad_field(caught.value) == field


async def test_a_bad_filter_is_named(stub: Stub) -> None:
    spoilt = {
        "filter.after_id": pb.JudgementFilter(after_id=2**64 - 1),
        "filter.sources[0]": pb.JudgementFilter(sources=["\0"]),
        "filter.labels": pb.JudgementFilter(labels={str(n): "" for n in range(33)}),
    }
    for field, selection in spoilt.items():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetStats(pb.GetStatsRequest(filter=selection))
        assert bad_field(caught.value) == field
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.ExportJudgements(
            pb.ExportJudgementsRequest(snapshot_id="any", filter=pb.JudgementFilter(sources=["a"]))
        ):
            pass
    assert bad_field(caught.value) == "filter"


async def test_an_import_that_broke_is_repeated_and_stores_each_once(stub: Stub) -> None:
    arrived = asyncio.Event()

    async def breaking() -> AsyncIterator[pb.ImportJudgementsRequest]:
        for request in requests(range(25)):
            yield request
        await arrived.wait()

    call = stub.ImportJudgements(breaking())
    async with asyncio.timeout(30):
        while (await stub.GetStats(pb.GetStatsRequest())).judgements < 20:  # two batches of ten
            await asyncio.sleep(0.01)
    call.cancel()
    arrived.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    repeated = await stub.ImportJudgements(iter(requests(range(35))))
    assert repeated.stored + repeated.duplicates == 35
    assert repeated.duplicates in {
        20,
        25,
    }  # a stream that broke ends, for the server, now as if it were whole, now with an error
    assert await stub.ImportJudgements(iter(requests(range(35)))) == pb.ImportJudgementsResponse(duplicates=35)
    exported = [response.judgement async for response in stub.ExportJudgements(pb.ExportJudgementsRequest())]
    assert [judgement.responses[0].text for judgement in exported] == [f"a fine film {n}" for n in range(35)]


async def test_an_import_says_which_message_is_bad(stub: Stub) -> None:
    sent = requests(range(30))
    sent[23].judgement.pairwise.preferred = 2
    with pytest.raises(grpc.aio.AioRpcError, match="message 24 of the stream: no response 2") as caught:
        await stub.ImportJudgements(iter(sent))
    assert bad_field(caught.value) == "judgement.pairwise.preferred"
    assert (await stub.GetStats(pb.GetStatsRequest())).judgements % 10 == 0  # whole batches only


async def test_an_import_says_which_key_is_taken(stub: Stub) -> None:
    await stub.ImportJudgements(iter(requests(range(15))))
    sent = requests(range(20))
    sent[12].judgement.prompt = "another"
    with pytest.raises(grpc.aio.AioRpcError, match="message 13 of the stream: idempotency key 'k12'") as caught:
        await stub.ImportJudgements(iter(sent))
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS


async def test_an_empty_import_stores_nothing(stub: Stub) -> None:
    assert await stub.ImportJudgements(iter(())) == pb.ImportJudgementsResponse()


async def test_an_export_resumes_after_its_cursor(stub: Stub) -> None:
    await stub.ImportJudgements(iter(requests(range(20))))
    seen: list[int] = []
    first = stub.ExportJudgements(pb.ExportJudgementsRequest())
    async for response in first:
        seen.append(response.judgement.id)
        if len(seen) == 7:
            first.cancel()
            break
    rest = pb.ExportJudgementsRequest(filter=pb.JudgementFilter(after_id=seen[-1]))
    seen += [response.judgement.id async for response in stub.ExportJudgements(rest)]
    assert seen == list(range(1, 21))


async def test_a_snapshot_a_count_and_an_erasure_answer(stub: Stub) -> None:
    await stub.ImportJudgements(iter(requests(range(5))))
    made = await stub.CreateSnapshot(pb.CreateSnapshotRequest(idempotency_key="s"))
    assert (made.judgements, len(made.content_sha256)) == (5, 64)
    assert await stub.CreateSnapshot(pb.CreateSnapshotRequest(idempotency_key="s")) == made
    erased = await stub.EraseAnnotator(pb.EraseAnnotatorRequest(annotator="ann-1"))
    assert erased.judgements == 5
    stats = await stub.GetStats(pb.GetStatsRequest())
    assert (stats.judgements, dict(stats.by_kind), dict(stats.by_source)) == (5, {"pairwise": 5}, {"import": 5})
    assert (stats.annotators, stats.last_id) == (0, 5)
    request = pb.ExportJudgementsRequest(snapshot_id=made.snapshot_id)
    assert [r.judgement.annotator async for r in stub.ExportJudgements(request)] == ["erased"] * 5


async def test_tasks_are_unimplemented_and_say_what_to_use(stub: Stub) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="RecordJudgement") as caught:
        await stub.NextTask(pb.NextTaskRequest(annotator="a"))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.aio.AioRpcError, match="RecordJudgement") as caught:
        await stub.SubmitTask(pb.SubmitTaskRequest(task_id="t", judgement=full(), idempotency_key="k"))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("bound", [{"waiting": 1}, {"waiting_bytes": 1}], ids=["too many", "too large"])
async def test_waiting_writers_beyond_the_bound_are_sent_away_with_a_time(
    sqlite_url: str, make_store, bound: dict[str, int]
) -> None:
    async with make_store(sqlite_url, StoreOptions(writer=GroupOptions(rows=1, **bound))) as store:
        async for stub in serve(store):
            calls = [
                stub.RecordJudgement(pb.RecordJudgementRequest(judgement=pair(n), idempotency_key=f"k{n}")) for n in range(40)
            ]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
            assert refused
            assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            detail = rpc_status.from_call(refused[0]).details
            assert any(entry.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for entry in detail)
            stored = (await stub.GetStats(pb.GetStatsRequest())).judgements
            assert stored == 40 - len(refused)
