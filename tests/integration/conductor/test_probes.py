"""Claims about the probes of a launcher, over the health port of a real server."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import grpc
import pytest

from honed.conductor.probes import alive_probe, ready_probe
from honed.kit.errors import Unavailable
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.settings import ServerSettings
from honed.v1 import preference_pb2_grpc

NAME = "honed.v1.PreferenceService"


@pytest.fixture
def section() -> ServerSettings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return ServerSettings(health_port=probe.getsockname()[1])


@pytest.fixture
async def server(section: ServerSettings) -> AsyncIterator[Server]:
    servicer = preference_pb2_grpc.PreferenceServiceServicer()
    registration = Servicer(NAME, preference_pb2_grpc.add_PreferenceServiceServicer_to_server, servicer)
    options = ServerOptions(health_port=section.health_port, drain_s=1.0)
    server = Server([Listener("127.0.0.1", 0, [registration])], options)
    await server.start()
    yield server
    await server.stop()


async def test_a_process_is_alive_while_it_starts_serves_and_drains(section: ServerSettings, server: Server) -> None:
    alive = alive_probe(section)
    await alive()
    await server.ready()
    await ready_probe(section, NAME)()
    await alive()
    server.health.pulse("training", limit_s=-1.0)  # ends with the drain
    await server.health.shut_down()
    await alive()


async def test_a_loop_that_stands_still_is_a_missed_probe_until_it_goes_on(section: ServerSettings, server: Server) -> None:
    await server.ready()
    pulse = server.health.pulse("training", limit_s=-1.0)
    with pytest.raises(Unavailable, match="a loop of the process stands still"):
        await alive_probe(section)()
    with pulse.idle():
        pulse.limit_s = 60.0
    await alive_probe(section)()


async def test_a_process_that_does_not_answer_is_a_missed_probe(section: ServerSettings) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await alive_probe(section)()
