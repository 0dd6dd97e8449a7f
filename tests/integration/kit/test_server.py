"""The kit's server over real sockets: tokens, validation, rich errors, health, deadlines, drain."""

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.calls import failure

from honed.kit import health as health_module
from honed.kit.channel import connect
from honed.kit.errors import Overloaded
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.kit.tokens import TokenTable, ensure_local_tokens, read_token
from honed.queue.embedded import free_port
from honed.v1 import preference_pb2, preference_pb2_grpc

NAME = "honed.v1.PreferenceService"


class Preference(preference_pb2_grpc.PreferenceServiceServicer):
    """A servicer whose behaviour each test chooses by the annotator's name."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()

    async def RecordJudgement(self, request: Any, context: Any) -> Any:
        match request.judgement.annotator:
            case "overload":
                raise Overloaded("the queue is full", retry_after_s=2.5)
            case "bug":
                raise RuntimeError("secret detail")
            case "slow":
                self.entered.set()
                await self.release.wait()
        return preference_pb2.RecordJudgementResponse(id=1)

    async def ExportJudgements(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield preference_pb2.ExportJudgementsResponse()
        await asyncio.Event().wait()


class Running:
    def __init__(self, server: Server, servicer: Preference, tokens: Path, options: ServerOptions) -> None:
        self.server, self.servicer, self.tokens, self.options = server, servicer, tokens, options
        self.address = f"127.0.0.1:{server.ports[0]}"

    def stub(self, token: str | None) -> Any:
        self.channel = connect(self.address, token)
        return preference_pb2_grpc.PreferenceServiceStub(self.channel)


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    ensure_local_tokens(tmp_path)
    servicer = Preference()
    options = ServerOptions(
        tokens=TokenTable.load(tmp_path / "table.json"), deadline_s=1.0, drain_s=5.0,
        health_port=free_port(), metrics_port=free_port(),
    )  # fmt: skip
    registration = Servicer(NAME, preference_pb2_grpc.add_PreferenceServiceServicer_to_server, servicer)
    server = Server([Listener("127.0.0.1", 0, [registration])], options)
    await server.start()
    await server.ready()
    run = Running(server, servicer, tmp_path, options)
    yield run
    servicer.release.set()
    await server.stop()


def a_judgement(annotator: str = "ann") -> preference_pb2.RecordJudgementRequest:
    judgement = preference_pb2.Judgement(
        annotator=annotator, source="test", responses=[preference_pb2.JudgedResponse(text="a")],
        thumbs=preference_pb2.ThumbsJudgement(up=True),
    )  # fmt: skip
    return preference_pb2.RecordJudgementRequest(judgement=judgement, idempotency_key="k")


async def test_a_call_with_the_right_token_is_served(running: Running) -> None:
    stub = running.stub(read_token(running.tokens / "application.token"))
    assert (await stub.RecordJudgement(a_judgement(), timeout=5)).id == 1


async def test_a_missing_and_a_wrong_token_are_unauthenticated(running: Running) -> None:
    for token in (None, "honed_wrong"):
        error, _ = await failure(running.stub(token).RecordJudgement(a_judgement(), timeout=5))
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_without_the_scope_is_refused_and_told_which(running: Running) -> None:
    stub = running.stub(read_token(running.tokens / "application.token"))
    error, _ = await failure(stub.EraseAnnotator(preference_pb2.EraseAnnotatorRequest(annotator="x"), timeout=5))
    assert error.code() == grpc.StatusCode.PERMISSION_DENIED
    assert "'preference.control'" in (error.details() or "")


async def test_a_bad_field_is_named(running: Running) -> None:
    request = a_judgement()
    request.judgement.rating.CopyFrom(preference_pb2.RatingJudgement(value=9, low=0, high=5))
    stub = running.stub(read_token(running.tokens / "operator.token"))
    error, details = await failure(stub.RecordJudgement(request, timeout=5))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "judgement.rating"


async def test_overload_says_when_to_come_back(running: Running) -> None:
    stub = running.stub(read_token(running.tokens / "operator.token"))
    error, details = await failure(stub.RecordJudgement(a_judgement("overload"), timeout=5))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 2500


async def test_a_bug_shows_no_detail_but_a_request_id(running: Running) -> None:
    stub = running.stub(read_token(running.tokens / "operator.token"))
    error, details = await failure(stub.RecordJudgement(a_judgement("bug"), timeout=5, metadata=(("x-request-id", "r-17"),)))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in (error.details() or "")
    assert details["RequestInfo"].request_id == "r-17"


async def test_a_call_without_a_deadline_gets_the_servers(running: Running) -> None:
    stub = running.stub(read_token(running.tokens / "operator.token"))
    error, _ = await failure(stub.RecordJudgement(a_judgement("slow")))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_stream_without_a_deadline_gets_the_servers(running: Running) -> None:
    stub = running.stub(read_token(running.tokens / "operator.token"))
    call = stub.ExportJudgements(preference_pb2.ExportJudgementsRequest())
    received = []

    async def read() -> None:
        async for message in call:
            received.append(message)

    error, _ = await failure(read())
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(received) == 1


async def test_health_has_its_own_port_and_turns_off_at_a_drain(running: Running) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.options.health_port}") as channel:
        probe = health_pb2_grpc.HealthStub(channel)
        assert (await probe.Check(health_pb2.HealthCheckRequest(service=NAME), timeout=5)).status == 1
        watch = probe.Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=10)
        other = probe.Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=10)
        assert (await watch.read()).status == 1
        assert (await other.read()).status == 1
        other.cancel()
        await running.server.health.shut_down()
        assert (await watch.read()).status == 2
        assert (await probe.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == 1


async def test_a_watcher_of_liveness_hears_of_a_loop_that_stands_still(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "WATCH_EVERY_S", 0.02)
    pulse = running.server.health.pulse("update", 3600)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.options.health_port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert (await watch.read()).status == 1
        pulse.limit_s = -1.0  # as if the hour were over
        assert (await watch.read()).status == 2


async def test_watches_of_health_are_limited(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "MAX_WATCHES", 1)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.options.health_port}") as channel:
        probe = health_pb2_grpc.HealthStub(channel)
        watch = probe.Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=10)
        assert (await watch.read()).status == 1
        error, _ = await failure(probe.Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=10).read())
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await probe.Check(health_pb2.HealthCheckRequest(service=NAME), timeout=5)).status == 1


async def test_a_drain_lets_the_call_in_flight_finish(running: Running) -> None:
    stub = running.stub(read_token(running.tokens / "operator.token"))
    call = asyncio.ensure_future(stub.RecordJudgement(a_judgement("slow"), timeout=1))
    await asyncio.wait_for(running.servicer.entered.wait(), 30)
    stop = asyncio.ensure_future(running.server.stop())
    running.servicer.release.set()
    assert (await call).id == 1
    await stop


async def test_a_taken_port_is_an_error_that_names_it(running: Running) -> None:
    port = running.server.ports[0]
    registration = Servicer(NAME, preference_pb2_grpc.add_PreferenceServiceServicer_to_server, Preference())
    with pytest.raises(OSError, match=str(port)):
        await Server([Listener("127.0.0.1", port, [registration])], ServerOptions()).start()


async def test_a_taken_metrics_port_is_an_error_that_names_it(running: Running) -> None:
    port = running.options.metrics_port
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port} for metrics: is the port taken by another run?"):
        await Server([], ServerOptions(metrics_port=port)).start()


async def test_metrics_count_calls_by_code(running: Running) -> None:
    stub = running.stub(read_token(running.tokens / "operator.token"))
    await stub.RecordJudgement(a_judgement(), timeout=5)
    url = f"http://127.0.0.1:{running.options.metrics_port}/metrics"
    page = (await asyncio.to_thread(urllib.request.urlopen, url, timeout=5)).read().decode()
    assert 'honed_grpc_calls_total{code="OK",method="/honed.v1.PreferenceService/RecordJudgement"}' in page


async def test_reflection_lists_the_service(running: Running) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
        answer = await call.read()
    assert NAME in [s.name for s in answer.list_services_response.service]


def test_token_files_are_private_and_the_table_holds_no_token(tmp_path: Path) -> None:
    ensure_local_tokens(tmp_path)
    token = read_token(tmp_path / "operator.token")
    assert token not in (tmp_path / "table.json").read_text()
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}
    before = json.loads((tmp_path / "table.json").read_text())
    ensure_local_tokens(tmp_path)
    assert json.loads((tmp_path / "table.json").read_text()) == before
