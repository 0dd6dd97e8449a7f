"""The traces of calls: who continues whose, which failures are whose, and what a collector that is away costs."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from loadtest.replicas import Replicas
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import use_span
from prometheus_client import REGISTRY
from tests.integration.queue.servers import Server as RedisServer
from tests.support.collector import Collector, collecting
from tests.support.run import environment, run_tree, until
from tests.support.tiny import make_canaries, publish_version

import honed
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.kit import otlp, tracing
from honed.kit.channel import connect
from honed.kit.errors import InvalidArgument
from honed.kit.log import JsonFormatter
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.kit.tokens import read_token
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.embedded import free_port
from honed.queue.keys import RunKeys
from honed.queue.members import GENERATION, Members
from honed.telemetry import traced
from honed.v1 import generation_pb2, generation_pb2_grpc

NAME = "honed.v1.GenerationService"
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SERVICE = {"service.name": "generation"}


class Generation(generation_pb2_grpc.GenerationServiceServicer):
    """Does as the prompt says, and remembers the log line of its last call."""

    def __init__(self) -> None:
        self.line: dict[str, Any] = {}
        self.entered = asyncio.Event()
        self.next: Serving | None = None

    async def Generate(self, request: Any, context: Any) -> Any:
        self.line = json.loads(JsonFormatter("test").format(logging.makeLogRecord({"msg": "inside"})))
        self.entered.set()
        match request.prompt.text:
            case "bad":
                raise InvalidArgument("prompt.text", "is bad")
            case "bug":
                raise RuntimeError("a secret of a person")
            case "wait":
                await asyncio.Event().wait()
        if self.next is not None:
            await self.next.call()
        with tracing.span("inner"):
            return generation_pb2.GenerateResponse()

    async def GetPolicy(self, request: Any, context: Any) -> Any:
        return generation_pb2.GetPolicyResponse()

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield generation_pb2.StreamGenerateResponse()
        if request.prompt.text == "wait":
            await asyncio.Event().wait()
        yield generation_pb2.StreamGenerateResponse()


class Serving:
    def __init__(self, servicer: Generation, address: str, channel: grpc.aio.Channel) -> None:
        self.servicer, self.address = servicer, address
        self.stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)

    async def call(self, text: str = "fine", traceparent: str = "") -> Any:
        request = generation_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text=text))
        metadata = (("traceparent", traceparent),) if traceparent else ()
        return await self.stub.Generate(request, timeout=10, metadata=metadata)


@asynccontextmanager
async def serving() -> AsyncIterator[Serving]:
    servicer = Generation()
    registered = Servicer(NAME, generation_pb2_grpc.add_GenerationServiceServicer_to_server, servicer)
    server = Server([Listener("127.0.0.1", 0, [registered])], ServerOptions(drain_s=1.0))
    await server.start()
    address = f"127.0.0.1:{server.ports[0]}"
    async with connect(address) as channel:
        yield Serving(servicer, address, channel)
    await server.stop()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


def exporting(collector: Collector, ratio: float = 1.0) -> Any:
    return otlp.exporting(otlp.Collector(collector.endpoint), ratio, SERVICE)


async def test_a_callers_trace_goes_on_in_the_server_its_spans_and_its_log(collector: Collector) -> None:
    with exporting(collector):
        async with serving() as service:
            await service.call(traceparent=f"00-{TRACE}-{SPAN}-01")
    server = collector.one(f"{NAME}/Generate")
    assert (server.kind, server.trace, server.parent) == ("server", TRACE, SPAN)
    assert collector.one("inner").parent == server.id
    assert (service.servicer.line["trace_id"], service.servicer.line["span_id"]) == (TRACE, server.id)


async def test_a_call_without_a_trace_begins_one_and_one_that_is_not_sampled_stays_so(collector: Collector) -> None:
    with exporting(collector):
        async with serving() as service:
            await service.call()
            await service.call(traceparent=f"00-{TRACE}-{SPAN}-00")
    server = collector.one(f"{NAME}/Generate")
    assert server.parent == ""
    assert service.servicer.line["trace_id"] == TRACE, "its log lines have their trace all the same"


async def test_a_look_begins_no_trace_and_is_a_span_of_its_callers(collector: Collector) -> None:
    with exporting(collector):
        async with serving() as service:
            await service.stub.GetPolicy(generation_pb2.GetPolicyRequest(), timeout=10)
            with tracing.span("work", head=True):
                await service.stub.GetPolicy(generation_pb2.GetPolicyRequest(), timeout=10)
    assert sorted(span.kind for span in collector.named(f"{NAME}/GetPolicy")) == ["client", "server"]
    assert {span.trace for span in collector.spans} == {collector.one("work").trace}


async def test_off_the_callers_trace_is_in_the_log_and_no_trace_leaks_into_the_next_call() -> None:
    async with serving() as service:
        await service.call(traceparent=f"00-{TRACE}-{SPAN}-01")
        assert (service.servicer.line["trace_id"], service.servicer.line["span_id"]) == (TRACE, SPAN)
        await service.call()
        assert "trace_id" not in service.servicer.line


async def test_a_stream_is_one_span_of_its_server(collector: Collector) -> None:
    with exporting(collector):
        async with serving() as service:
            with tracing.span("work", head=True):
                whole, left = (
                    service.stub.StreamGenerate(
                        generation_pb2.StreamGenerateRequest(prompt=generation_pb2.Prompt(text=text)), timeout=10
                    )
                    for text in ("fine", "wait")
                )
                assert len([part async for part in whole]) == 2
                await left.read()
                left.cancel()
                await until(lambda: left.done(), 60, "the stream is over")
    streams, work = collector.named(f"{NAME}/StreamGenerate"), collector.one("work")
    assert [(span.kind, span.parent) for span in streams] == [("server", work.id)] * 2
    assert [span.attributes["rpc.grpc.status_code"] for span in streams] == [0, 1]


@pytest.mark.parametrize(("text", "code", "servers_fault"), [("bad", 3, False), ("bug", 13, True)])
async def test_a_failure_is_an_error_of_the_call_and_of_the_server_where_it_is_its_fault(
    collector: Collector, text: str, code: int, servers_fault: bool
) -> None:
    with exporting(collector):
        async with serving() as service:
            with tracing.span("work", head=True), pytest.raises(grpc.aio.AioRpcError):
                await service.call(text)
    client, server = (next(s for s in collector.named(f"{NAME}/Generate") if s.kind == kind) for kind in ("client", "server"))
    assert server.parent == client.id
    assert (client.failed, server.failed) == (True, servers_fault)
    assert client.attributes["rpc.grpc.status_code"] == server.attributes["rpc.grpc.status_code"] == code
    assert "secret" not in repr(collector.spans)


async def test_a_caller_that_gives_up_inside_of_a_trace_cancels_the_call_at_the_server(collector: Collector) -> None:
    with exporting(collector):
        async with serving() as service:
            with tracing.span("work", head=True):
                call = asyncio.create_task(service.call("wait"))
                await service.servicer.entered.wait()
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
    codes = {span.kind: span.attributes["rpc.grpc.status_code"] for span in collector.named(f"{NAME}/Generate")}
    assert codes == {"client": 1, "server": 1}


async def test_work_that_is_cancelled_is_no_success(collector: Collector) -> None:
    async def wait() -> None:
        with tracing.span("one", head=True) as one, tracing.ending([tracing.begin("each", one.context) for _ in range(2)]):
            await asyncio.Event().wait()

    with exporting(collector):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wait(), 0.05)
        with pytest.raises(SystemExit), tracing.span("job", head=True):
            raise SystemExit(143)
    found = sorted((span.name, span.failed, span.attributes["error.type"]) for span in collector.spans)
    assert found == [("each", True, "cancelled")] * 2 + [("job", True, "SystemExit"), ("one", True, "cancelled")]


async def test_an_applications_own_trace_goes_on_in_the_service(collector: Collector) -> None:
    own = TracerProvider().get_tracer("shop").start_span("checkout")

    def ask() -> None:
        with honed.Client(generation=service.address) as client, use_span(own):
            client.generate("fine")

    with exporting(collector):
        async with serving() as service:
            await asyncio.to_thread(ask)
    server = collector.one(f"{NAME}/Generate")
    assert server.place[0] == f"{own.get_span_context().trace_id:032x}"
    assert server.parent == f"{own.get_span_context().span_id:016x}"


async def test_a_share_of_the_traces_is_recorded(collector: Collector) -> None:
    with exporting(collector, 0.25):
        for _ in range(1000):
            tracing.begin("work", None, head=True).end()
    assert 150 < len(collector.spans) < 350


async def test_a_trace_through_two_services_is_whole_or_absent(collector: Collector) -> None:
    """The first service decides; the second does as it says, for what is not recorded too."""
    with exporting(collector, 0.5):
        async with serving() as inner, serving() as outer:
            outer.servicer.next = inner
            for _ in range(60):
                await outer.call()
    kinds: dict[str, list[str]] = {}
    for span in collector.spans:
        kinds.setdefault(span.trace, []).append(span.kind)
    assert {tuple(sorted(found)) for found in kinds.values()} == {("client", "internal", "internal", "server", "server")}
    assert 10 < len(kinds) < 50


async def test_spans_draw_no_number_from_a_seeded_generator(collector: Collector) -> None:
    """P6: what a learner or a scorer draws is the same with traces and without."""
    with exporting(collector):
        random.seed(7)
        tracing.begin("work", None, head=True).end()
        drawn = random.random()
    random.seed(7)
    assert drawn == random.random()


async def test_retries_to_a_collector_that_is_away_draw_no_number_from_a_seeded_generator(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setattr(otlp, "_EXPORT_S", 0.3)
    with otlp.exporting(otlp.Collector(f"http://127.0.0.1:{free_port()}"), 1.0, SERVICE):
        random.seed(7)
        tracing.begin("work", None, head=True).end()
        await until(lambda: "spans cannot be exported" in caplog.text, 60, "the export has failed")
        drawn = random.random()
    random.seed(7)
    assert drawn == random.random()


async def test_a_collector_that_is_away_is_told_of_once_and_again_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setattr(otlp, "_EXPORT_S", 0.3)
    caplog.set_level(logging.INFO)
    port = free_port()

    def said(text: str) -> int:
        return sum(text in record.getMessage() for record in caplog.records)

    with otlp.exporting(otlp.Collector(f"http://127.0.0.1:{port}"), 1.0, SERVICE):
        for number in range(5):
            tracing.begin(f"lost {number}", None, head=True).end()
            await asyncio.sleep(0.2)
        await until(lambda: said("spans cannot be exported"), 60, "the warning")
        with collecting(port) as collector:

            def works() -> bool:
                tracing.begin("kept", None, head=True).end()
                return bool(collector.named("kept"))

            await until(works, 60, "spans arrive", every_s=0.1)
            await until(lambda: said("spans are exported again"), 60, "the good news")
            assert said("spans cannot be exported") == 1
            assert lost("export_failed") >= 5
    warning = next(record for record in caplog.records if "cannot be exported" in record.getMessage())
    assert "UNAVAILABLE" in warning.__dict__["reason"]
    assert {record.name for record in caplog.records if "opentelemetry" in record.name} == set()


async def test_a_token_of_the_collector_that_is_replaced_goes_with_the_next_export(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    headers = tmp_path / "headers"
    settings = RunSettings.model_validate({"telemetry": {"otlp_endpoint": collector.endpoint, "headers_file": str(headers)}})
    headers.write_text("authorization: Bearer first\n")
    with traced(settings, "generation", {}):
        for token in ("first", "the second"):
            headers.write_text(f"authorization: Bearer {token}\n")
            tracing.begin(token, None, head=True).end()
            await until(partial(collector.named, token), 60, f"the span under {token}")
            assert collector.metadata["authorization"] == f"Bearer {token}"


def lost(reason: str) -> float:
    return REGISTRY.get_sample_value("honed_spans_lost_total", {"reason": reason}) or 0.0


async def test_spans_that_find_the_queue_full_are_counted_and_warned_of_once(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "512")
    before = lost("queue_full"), lost("export_failed")
    with exporting(collector):
        for _ in range(5000):
            tracing.begin("work", None, head=True).end()
    assert len(collector.spans) < 5000, "it was no load at all"
    assert (lost("queue_full") - before[0], lost("export_failed") - before[1]) == (5000 - len(collector.spans), 0)
    warned = [record.__dict__["queue"] for record in caplog.records if "finds the queue full" in record.getMessage()]
    assert warned == [512]


async def test_what_opentelemetry_says_to_others_in_the_process_is_logged(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    """A scorer may export spans, logs or metrics of its own by the same packages."""
    names = [f"opentelemetry.{name}" for name in ("exporter.otlp.proto.grpc.exporter", "sdk._shared_internal", "sdk.metrics")]
    with exporting(collector):
        for name in names:
            logging.getLogger(name).error("of somebody else")
    assert [record.name for record in caplog.records if record.getMessage() == "of somebody else"] == names


async def test_a_span_that_ends_after_the_stop_is_quietly_lost(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with exporting(collector):
        late = tracing.begin("late", None, head=True)
    late.end()
    late.set({"more": 1})
    late.fail("cancelled")
    assert [record.name for record in caplog.records if "opentelemetry" in record.name] == []


@pytest.fixture
def silent_endpoint() -> Iterator[str]:
    """A port that takes connections and never answers: the worst of collectors."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_stop_does_not_wait_for_a_collector_that_never_answers(silent_endpoint: str) -> None:
    started = time.monotonic()
    with otlp.exporting(otlp.Collector(silent_endpoint), 1.0, SERVICE):
        for _ in range(5000):  # more than wait at most
            tracing.begin("work", None, head=True).end()
        assert time.monotonic() - started < 2.0, "nobody who makes spans waits"
        ending = time.monotonic()
    assert time.monotonic() - ending < otlp.FLUSH_S + 1.0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.mark.redis
@pytest.mark.timeout(240)
async def test_a_generator_whose_collector_never_answers_serves_and_stops_in_time(
    silent_endpoint: str, redis: RedisServer, tmp_path: Path
) -> None:
    run = "small"
    async with RedisLink(redis.url, retry=RetryPolicy(deadline_s=10)) as link:
        tree = run_tree(tmp_path)
        tree["telemetry"] = {"otlp_endpoint": silent_endpoint}
        members = Members(link, RunKeys(run), GENERATION)
        generators = Replicas(tmp_path, tree, redis.url, members, environment())
        model, store = tmp_path / "model", PolicyStore(tmp_path / "run" / "policy", run)
        publish_version(store, model, VersionId(0, 0), canaries=make_canaries(model))
        try:
            process = generators.start(0)
            await generators.ready(process)
            token = read_token(tmp_path / "run" / "tokens" / "application.token")
            async with connect(process.address, token) as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                prompt = generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=[10, 20, 30]))
                for _ in range(20):
                    await stub.Generate(generation_pb2.GenerateRequest(prompt=prompt), timeout=10)
            started = time.monotonic()
            process.process.terminate()
            assert await process.ended() == 0, process.tail()
            assert time.monotonic() - started < 15, "drain, the engine's end, and two seconds for the collector"
        finally:
            generators.stop()
    log = process.log.read_text()
    assert log.count("spans cannot be exported") <= 1
    assert "opentelemetry" not in log
