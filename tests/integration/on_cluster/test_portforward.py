"""Claims about forwarded ports: bytes go both ways whole, a new Pod is found when one goes, nothing hangs or is left."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.on_cluster.conftest import GRPC, Place
from tests.support.authority import Authority
from tests.support.kubernetes import KubernetesApi, kubeconfig, kubernetes_api, pod
from tests.support.waiting import wait_until

from honed.client import Client, RequestError
from honed.cluster import forward as forward_module
from honed.cluster import portforward
from honed.cluster.api import Cluster
from honed.cluster.forward import Forward
from honed.cluster.pods import Pod, list_pods
from honed.kit.errors import Unavailable

MANY = 6 << 20


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it gets, and closes when the other side does."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True))
                threads[-1].start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    yield listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    accepting.join(10)


@pytest.fixture(params=["http", "https"])
def api(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[KubernetesApi, Cluster]]:
    """An API server with and without TLS: over TLS bytes wait where no poll sees them."""
    authority = Authority(tmp_path, "authority") if request.param == "https" else None
    with kubernetes_api(tmp_path, authority) as (served, kubeconfig):
        yield served, Cluster.of("", {"KUBECONFIG": str(kubeconfig)})


def forwarded(api: KubernetesApi, cluster: Cluster, backend: tuple[str, int]) -> Forward:
    api.put("pods", "g-1", pod("generation"))
    api.backends["g-1", GRPC] = backend
    return Forward(cluster, "generation", "grpc", list_pods(cluster, "generation"))


def exchanged(port: int, data: bytes, pause_s: float = 0.0) -> bytes:
    """What comes back of data that is sent while it is read."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        sending = threading.Thread(target=connection.sendall, args=(data,))
        sending.start()
        back = bytearray()
        while len(back) < len(data):
            time.sleep(pause_s)
            if not (part := connection.recv(1 << 17)):
                break
            back += part
        sending.join(60)
        return bytes(back)


def test_bytes_go_both_ways_whole(api: tuple[KubernetesApi, Cluster], echo: tuple[str, int]) -> None:
    data = os.urandom(MANY)
    with forwarded(*api, echo) as forward:
        back = exchanged(forward.port, data)
    assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()
    assert forward.trouble == ""


def test_who_does_not_read_holds_the_writer_up(api: tuple[KubernetesApi, Cluster], echo: tuple[str, int]) -> None:
    """Nothing in between keeps what nobody takes."""
    most, chunk, taken = 256 << 20, bytes(1 << 20), 0
    with forwarded(*api, echo) as forward, socket.create_connection(("127.0.0.1", forward.port)) as connection:
        connection.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            while taken < most:
                taken += connection.send(chunk)
    assert taken < most


def test_a_slow_reader_loses_nothing(api: tuple[KubernetesApi, Cluster], echo: tuple[str, int]) -> None:
    data = os.urandom(2 << 20)
    with forwarded(*api, echo) as forward:
        assert exchanged(forward.port, data, pause_s=0.01) == data


def test_pings_between_the_frames_are_answered(api: tuple[KubernetesApi, Cluster], echo: tuple[str, int]) -> None:
    api[0].ping = True
    data = os.urandom(1 << 20)
    with forwarded(*api, echo) as forward:
        assert exchanged(forward.port, data) == data


def test_many_connections_at_once_keep_apart(api: tuple[KubernetesApi, Cluster], echo: tuple[str, int]) -> None:
    found: dict[int, bool] = {}
    with forwarded(*api, echo) as forward:

        def one(number: int) -> None:
            data = bytes([number]) * 300_000
            found[number] = exchanged(forward.port, data) == data

        threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == dict.fromkeys(range(8), True)


def closed(connection: socket.socket) -> bool:
    """Whether the other side ends the connection, within its timeout."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_closing_ends_every_stream_and_thread(api: tuple[KubernetesApi, Cluster], echo: tuple[str, int]) -> None:
    before = set(threading.enumerate())
    forward = forwarded(*api, echo)
    with socket.create_connection(("127.0.0.1", forward.port), timeout=10) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        forward.close()
        assert closed(connection)
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", forward.port), timeout=10)
    wait_until(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("honed")])


def test_a_connection_to_the_api_server_that_breaks_ends_the_local_one(
    api: tuple[KubernetesApi, Cluster], echo: tuple[str, int]
) -> None:
    """Nobody waits for ever; and the next connection works."""
    with forwarded(*api, echo) as forward:
        with socket.create_connection(("127.0.0.1", forward.port), timeout=10) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
            api[0].break_streams("g-1")
            assert closed(connection)
        assert exchanged(forward.port, b"again") == b"again"


def test_a_port_that_nobody_serves_is_told_in_the_kubelets_words(api: tuple[KubernetesApi, Cluster]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        gone = nobody.getsockname()
    with forwarded(*api, gone) as forward:
        with socket.create_connection(("127.0.0.1", forward.port), timeout=10) as connection:
            assert closed(connection)
        wait_until(lambda: forward.trouble)
        assert forward.trouble == "g-1: error forwarding port 50051 to pod g-1: connection refused"


@pytest.mark.parametrize("verb", ["get", "create"])
def test_a_right_that_is_missing_is_told(api: tuple[KubernetesApi, Cluster], echo: tuple[str, int], verb: str) -> None:
    api[0].forbidden.add((verb, "pods/portforward"))
    with forwarded(*api, echo) as forward:
        with socket.create_connection(("127.0.0.1", forward.port), timeout=10) as connection:
            assert closed(connection)
        wait_until(lambda: forward.trouble)
        assert f'cannot {verb} resource "pods/portforward"' in forward.trouble


def test_a_server_that_accepts_and_says_nothing_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by a caller, nor by the threads that are left when the port is closed."""
    monkeypatch.setattr(portforward, "_CONNECT_S", 0.5)
    before = set(threading.enumerate())
    found = Pod({**pod("generation"), "metadata": {"name": "g-1"}})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        path = tmp_path / "kubeconfig"
        path.write_text(kubeconfig(f"http://127.0.0.1:{silent.getsockname()[1]}"))
        forward = Forward(Cluster.of("", {"KUBECONFIG": str(path)}), "generation", "grpc", [found], pinned=True)
        with socket.create_connection(("127.0.0.1", forward.port), timeout=10) as connection:
            assert closed(connection)
            assert "does not answer" in forward.trouble
        with socket.create_connection(("127.0.0.1", forward.port), timeout=10) as connection:
            silent.accept()[0].close()
            upgrading = silent.accept()[0]  # the second stream waits for an answer to its upgrade
            forward.close()
            assert closed(connection)
            upgrading.close()
        wait_until(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("honed")])


def test_there_is_a_bound(api: tuple[KubernetesApi, Cluster], echo: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_module, "_MOST", 2)
    with forwarded(*api, echo) as forward, contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", forward.port), timeout=10))
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
        with socket.create_connection(("127.0.0.1", forward.port), timeout=10) as third:
            assert closed(third)
        assert forward.trouble == "2 connections to generation are open already"


def test_a_call_goes_to_the_service_and_back(place: Place) -> None:
    generation = place.generator("honed-generation-a")
    with Client.over(place.run().peer("generation")) as client:
        assert client.generate("the film was")[0].text == "a fine film"
    assert generation.metadata[0]["authorization"] == f"Bearer {(place.tokens / 'operator.token').read_text().strip()}"


def test_a_new_pod_is_chosen_when_one_goes(place: Place) -> None:
    one, other = place.generator("honed-generation-a"), place.generator("honed-generation-b")
    with Client.over(place.run().peer("generation")) as client:
        client.generate("first")
        assert place.api.forwards == ["honed-generation-a"]
        place.api.remove("pods", "honed-generation-a")
        place.api.break_streams("honed-generation-a")
        for number in range(3):
            client.generate(f"then {number}")
    assert (len(one.requests), len(other.requests)) == (1, 3)


def test_a_pod_that_is_called_ready_and_is_not_there_is_passed_over(place: Place) -> None:
    """The API server learns late of a node that is gone."""
    place.api.put("pods", "honed-generation-a", pod("generation"))
    other = place.generator("honed-generation-b")
    with Client.over(place.run().peer("generation")) as client:
        client.generate("x")
    assert len(other.requests) == 1
    assert place.api.forwards == ["honed-generation-a", "honed-generation-b"]


def test_a_call_in_flight_whose_pod_dies_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_module, "_PATIENCE_S", 1.0)
    generation = place.generator("honed-generation-a")
    generation.hanging = True
    died = {"terminated": {"exitCode": 1, "reason": "Error", "message": "honed: the engine died"}}
    failure: list[RequestError] = []

    def call() -> None:
        with Client.over(place.run().peer("generation")) as client, pytest.raises(RequestError) as raised:
            client.generate("x", timeout=30)
        failure.append(raised.value)

    calling = threading.Thread(target=call)
    calling.start()
    wait_until(lambda: generation.requests)
    status = {"name": "generation", "ready": False, "restartCount": 1, "state": died}
    place.api.put("pods", "honed-generation-a", pod("generation", ready=False, containerStatuses=[status]))
    place.api.break_streams("honed-generation-a")
    calling.join(60)
    [error] = failure
    assert error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    assert "the generation service in kind-test/honed did not answer" in str(error)
    assert "honed-generation-a: generation ended (exit code 1: honed: the engine died)" in str(error)
    assert "honed up" not in str(error)


def test_an_api_server_that_goes_away_is_named(place: Place) -> None:
    place.generator("honed-generation-a")
    with Client.over(place.run().peer("generation")) as client:
        client.generate("x")
        place.api.answers = [(503, {})] * 1000
        place.api.break_streams("honed-generation-a")
        with pytest.raises(RequestError) as raised:
            client.generate("x", timeout=4)
    assert "answers 503" in str(raised.value)


def test_an_api_server_that_says_nothing_holds_no_error_up(place: Place) -> None:
    """The call's own time is over when its reason is asked for."""
    place.generator("honed-generation-a")
    with Client.over(place.run().peer("generation")) as client:
        client.generate("x")
        place.api.hanging = True
        place.api.break_streams("honed-generation-a")
        begun = time.monotonic()
        with pytest.raises(RequestError) as raised:
            client.generate("x", timeout=1)
        assert time.monotonic() - begun < 15
    assert "does not answer" in str(raised.value)


def test_no_ready_pod_is_an_error_before_anything_is_sent(place: Place) -> None:
    waiting = {"name": "generation", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found: honed:9"}}}
    place.api.put("pods", "honed-generation-a", pod("generation", ready=False, containerStatuses=[waiting]))
    with pytest.raises(
        Unavailable, match=r"no generation Pod is ready in namespace kind-test/honed \(.*ImagePullBackOff: not found"
    ):
        place.run().peer("generation")
    assert place.api.forwards == []
