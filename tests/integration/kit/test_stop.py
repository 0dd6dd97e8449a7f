"""The end of a service: readiness first, then the ports, then the calls in flight, and only then what they used."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.support.calls import failure

from honed.kit.channel import connect
from honed.kit.server import Lifecycle, Listener, Server, ServerOptions, Servicer, serve_until_signalled
from honed.queue.embedded import free_port
from honed.v1 import generation_pb2 as pb
from honed.v1 import generation_pb2_grpc, learner_pb2, learner_pb2_grpc

NAME = "honed.v1.GenerationService"
LEARNER = "honed.v1.LearnerService"


class Engine(generation_pb2_grpc.GenerationServiceServicer):
    """Like an engine: whoever calls it after its end gets an error. Calls end when the test lets them."""

    def __init__(self) -> None:
        self.closed = False
        self.entered = asyncio.Semaphore(0)
        self.release = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> Any:
        self.entered.release()
        await self.release.wait()
        return pb.GenerateResponse(samples=[pb.Sample(text=self._text())])

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield pb.StreamGenerateResponse(delta=pb.Sample(text="first"))
        self.entered.release()
        await self.release.wait()
        yield pb.StreamGenerateResponse(delta=pb.Sample(text=self._text()))

    def _text(self) -> str:
        assert not self.closed, "the engine was closed under a call"
        return "last"


class Learner(learner_pb2_grpc.LearnerServiceServicer):
    """Has a watch that never ends on its own."""

    async def WatchMetrics(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield learner_pb2.WatchMetricsResponse()
        await asyncio.Event().wait()


class Service:
    """A service in this process, as `honed serve` runs it; `terminate` is its SIGTERM."""

    def __init__(self, **options: Any) -> None:
        self.engine = Engine()
        self.seen: list[str] = []
        self.health_port = free_port()
        self.server = Server(
            [
                Listener(
                    "127.0.0.1",
                    0,
                    [
                        Servicer(NAME, generation_pb2_grpc.add_GenerationServiceServicer_to_server, self.engine),
                        Servicer(LEARNER, learner_pb2_grpc.add_LearnerServiceServicer_to_server, Learner()),
                    ],
                )
            ],
            ServerOptions(
                health_port=self.health_port,
                open_ended=frozenset({f"/{LEARNER}/WatchMetrics"}),
                **{"drain_s": 20.0, **options},
            ),
        )
        self.ready, self.stopping = asyncio.Event(), asyncio.Event()

    async def work(self, lifecycle: Lifecycle) -> None:
        await self.server.ready()
        self.ready.set()
        await lifecycle.wait()
        self.seen.append("stopping")
        self.stopping.set()
        await lifecycle.drained.wait()
        self.seen.append("drained")
        self.engine.closed = True

    def channel(self) -> grpc.aio.Channel:
        return connect(f"127.0.0.1:{self.server.ports[0]}")


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    running: list[tuple[Service, asyncio.Future[None]]] = []

    async def started(**options: Any) -> tuple[Service, asyncio.Future[None]]:
        service = Service(**options)
        running.append((service, asyncio.ensure_future(serve_until_signalled(service.server, service.work))))
        await asyncio.wait_for(service.ready.wait(), 10)
        return running[-1]

    yield started
    for service, run in running:
        service.engine.release.set()
        if not run.done():
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(run, 30)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


async def test_calls_in_flight_end_well_and_the_engine_is_closed_after_them(start: Callable[..., Any]) -> None:
    service, run = await start()
    async with service.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        unary = asyncio.ensure_future(stub.Generate(pb.GenerateRequest(n=1, prompt={"text": "a"}), timeout=20))
        stream = stub.StreamGenerate(pb.StreamGenerateRequest(n=1, prompt={"text": "a"}), timeout=20)
        assert (await stream.read()).delta.text == "first"
        for _ in range(2):
            await asyncio.wait_for(service.engine.entered.acquire(), 10)
        terminate()
        await asyncio.wait_for(service.stopping.wait(), 10)
        await _refused(f"127.0.0.1:{service.server.ports[0]}")
        assert service.seen == ["stopping"]  # calls are in flight: nothing is closed
        service.engine.release.set()
        assert (await unary).samples[0].text == "last"
        assert (await stream.read()).delta.text == "last"
        await asyncio.wait_for(run, 10)
    assert service.seen == ["stopping", "drained"]


async def test_open_ended_streams_end_at_once_and_do_not_hold_up_the_end(start: Callable[..., Any]) -> None:
    service, run = await start()
    async with service.channel() as channel, grpc.aio.insecure_channel(f"127.0.0.1:{service.health_port}") as probe:
        watch = learner_pb2_grpc.LearnerServiceStub(channel).WatchMetrics(learner_pb2.WatchMetricsRequest(), timeout=60)
        await watch.read()
        health = health_pb2_grpc.HealthStub(probe).Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=60)
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=60)
        await reflect.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await reflect.read()
        terminate()
        error, details = await failure(watch.read())
        assert (error.code(), details["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "Unavailable")
        assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await asyncio.wait_for(run, 10)  # half of drain_s


async def test_while_it_lingers_a_service_is_not_ready_and_still_serves(start: Callable[..., Any]) -> None:
    service, run = await start(linger_s=0.5)
    service.engine.release.set()
    async with service.channel() as channel, grpc.aio.insecure_channel(f"127.0.0.1:{service.health_port}") as probe:
        health = health_pb2_grpc.HealthStub(probe).Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=60)
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        terminate()
        assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        # A new connection, as a load balancer makes one that has not looked yet.
        async with service.channel() as late:
            stub = generation_pb2_grpc.GenerationServiceStub(late)
            request = pb.GenerateRequest(n=1, prompt={"text": "a"})
            assert (await stub.Generate(request, timeout=5)).samples[0].text == "last"
        await asyncio.wait_for(run, 10)
        await channel.close()


async def test_readiness_stays_off_once_the_end_has_begun(start: Callable[..., Any]) -> None:
    service, run = await start()
    terminate()
    await asyncio.wait_for(service.stopping.wait(), 10)
    await service.server.ready()
    assert service.server.health.statuses[NAME] == health_pb2.HealthCheckResponse.NOT_SERVING
    await asyncio.wait_for(run, 10)


async def test_work_that_fails_ends_the_service_with_its_error() -> None:
    server = Service().server

    async def work(lifecycle: Lifecycle) -> None:
        raise RuntimeError("the engine died")

    with pytest.raises(RuntimeError, match="the engine died"):
        await serve_until_signalled(server, work)


class Quick(generation_pb2_grpc.GenerationServiceServicer):
    """Answers at once, unless it is told to hold calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.hold = False

    async def Generate(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self.hold:
            await asyncio.Event().wait()
        return pb.GenerateResponse()


async def _serve(quick: Quick, port: int = 0) -> Server:
    servicer = Servicer(NAME, generation_pb2_grpc.add_GenerationServiceServicer_to_server, quick)
    server = Server([Listener("127.0.0.1", port, [servicer])], ServerOptions(drain_s=5.0))
    await server.start()
    return server


async def test_a_server_that_stops_under_load_fails_no_call_while_another_one_serves() -> None:
    """gRPC answers CANCELLED what has arrived at a server that stops and was not handed to a handler."""
    quick, failed, over = Quick(), [], asyncio.Event()
    servers = [await _serve(quick), await _serve(quick)]
    ports = [server.ports[0] for server in servers]

    async def ask(stub: Any) -> None:
        while not over.is_set():
            try:
                await stub.Generate(pb.GenerateRequest(n=1, prompt={"text": "a"}), timeout=20)
            except grpc.aio.AioRpcError as error:
                failed.append(f"{error.code().name}: {error.details()}")

    async with connect("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)) as channel, asyncio.TaskGroup() as callers:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for _ in range(64):
            callers.create_task(ask(stub))
        for turn in range(8):
            which = turn % 2
            before = quick.calls
            async with asyncio.timeout(20):
                while quick.calls < before + 500:
                    await asyncio.sleep(0)
            await servers[which].stop()
            servers[which] = await _serve(quick, ports[which])
        over.set()
    for server in servers:
        await server.stop()
    assert failed == []


async def test_a_call_that_its_caller_cancels_is_made_once() -> None:
    quick = Quick()
    quick.hold = True
    server = await _serve(quick)
    async with connect(f"127.0.0.1:{server.ports[0]}") as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(
            pb.GenerateRequest(n=1, prompt={"text": "a"}), timeout=20
        )
        async with asyncio.timeout(30):
            while not quick.calls:
                await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.sleep(0.5)  # the first retry would have come after at most 0.12 s
        assert quick.calls == 1
    await server.stop()


async def _refused(address: str) -> None:
    """Waits until the port is closed."""
    host, port = address.split(":")
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                return
            writer.close()
            await asyncio.sleep(0.01)
