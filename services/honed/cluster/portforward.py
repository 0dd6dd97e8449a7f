"""One TCP connection into a Pod, by way of the API server: Kubernetes' port-forward over a WebSocket (v4.channel.k8s.io).

Channel 0 carries the bytes, channel 1 what went wrong; the first frame of each repeats the port. Nothing can be half closed:
when one side ends, so does the other, after what was on its way.

Settings and proxies are read as the official client reads them. Its `create_websocket` is not used: it has no deadline, so that
a server that accepts and says nothing is waited for without end. Nor is its `stream.portforward`: it keeps what it has read
without a bound, and where the connection to the API server breaks it leaves its sockets open: a caller waits for ever.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
from typing import Any, Final

import certifi
import websocket
from kubernetes.stream.ws_client import get_websocket_url, websocket_proxycare
from websocket import ABNF, WebSocketBadStatusException, WebSocketConnectionClosedException, WebSocketException

from honed.cluster.api import Cluster

PROTOCOL: Final = "v4.channel.k8s.io"

_DATA: Final = 0
_ERROR: Final = 1
_CONNECT_S: Final = 10.0
_CHUNK: Final = 64 * 1024
_LATER: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_BROKEN: Final = (WebSocketException, OSError, ValueError)
"""What a connection raises that breaks, or that another thread has closed."""


def open_stream(cluster: Cluster, pod: str, port: int) -> Any:
    """A WebSocket whose frames go to a port of a Pod, and come from there.

    Raises:
        PermissionDenied: who asks must not forward ports.
        NotFound: the Pod is gone.
        Unavailable: the API server, or the Pod's node, does not answer within `_CONNECT_S` seconds.
        HonedError: the API server refuses in another way.
    """
    configuration = cluster.configuration
    headers = {**cluster.headers(), "sec-websocket-protocol": PROTOCOL}
    url = get_websocket_url(f"{configuration.host}{cluster.core('pods', pod, 'portforward')}?ports={port}")
    try:
        return websocket.create_connection(
            url,
            timeout=_CONNECT_S,
            header=[f"{name}: {value}" for name, value in headers.items()],
            sslopt=_tls_options(configuration, url),
            **websocket_proxycare({}, configuration, url, headers),
        )
    except WebSocketBadStatusException as error:
        raise cluster.refused(error.status_code, error.resp_body or b"") from error
    except (WebSocketException, OSError) as error:
        raise cluster.away(error) from error


def _tls_options(configuration: Any, url: str) -> dict[str, Any]:
    """What the official client makes of its settings for a WebSocket over TLS."""
    if not (url.startswith("wss://") and configuration.verify_ssl):
        options: dict[str, Any] = {"cert_reqs": ssl.CERT_NONE}
    else:
        options = {"cert_reqs": ssl.CERT_REQUIRED, "ca_certs": configuration.ssl_ca_cert or certifi.where()}
        if configuration.assert_hostname is not None:
            options["check_hostname"] = configuration.assert_hostname
    given = {
        "certfile": configuration.cert_file,
        "keyfile": configuration.key_file,
        "server_hostname": configuration.tls_server_name,
    }
    return options | {name: value for name, value in given.items() if value}


class Stream:
    """Copies between a local connection and a Pod's, in the thread that calls `run`; one chunk waits in each direction."""

    def __init__(self, web: Any, local: socket.socket) -> None:
        """Takes both over: `run` closes them."""
        self._web, self._local = web, local
        self._up = self._down = b""
        self._opened: set[int] = set()
        self._failure = ""
        self._over = False
        # What answers a ping must not fall into the middle of a frame that is half sent.
        web.pong = self._answer

    def run(self) -> str:
        """Copies until one side ends. Returns what the Pod's side said of it; empty if it said nothing."""
        try:
            self._web.settimeout(0)
            self._local.setblocking(False)
            self._local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # tokens go as they come
            with selectors.DefaultSelector() as ready:
                while not self._over:
                    if not self._step():
                        self._wait(ready)
        except _BROKEN as error:
            self._failure = self._failure or str(error)
        finally:
            with contextlib.suppress(*_BROKEN):
                self._web.send_close()
            self._web.shutdown()
            with contextlib.suppress(OSError):
                self._local.settimeout(_CONNECT_S)
                self._local.sendall(self._down)
            self._local.close()
        return self._failure

    def end(self) -> None:
        """Ends `run`, from another thread."""
        for end in (self._local, self._web.sock):
            with contextlib.suppress(OSError, TypeError):
                # Not the method of a TLS socket, which forgets its keys first: `run` may be about to send.
                socket.socket.shutdown(end, socket.SHUT_RDWR)

    def _step(self) -> bool:
        """Moves what can be moved now; False if that was nothing."""
        before = (self._up, self._down)
        moved = False
        if not self._down:
            moved |= self._read_pod()
        if self._down:
            self._down = self._down[_sent(self._local, self._down) :]
        if self._over:
            return True
        if not self._up:
            moved |= self._read_local()
        if self._up:
            self._up = self._up[_sent(self._web.sock, self._up) :]
        return moved or before != (self._up, self._down)

    def _read_pod(self) -> bool:
        try:
            opcode, frame = self._web.recv_data_frame(True)
        except _LATER:
            return False
        except WebSocketConnectionClosedException:
            self._over = True
            return True
        if opcode == ABNF.OPCODE_CLOSE:
            self._over = True
        elif opcode == ABNF.OPCODE_BINARY and frame.data:
            channel, data = frame.data[0], bytes(frame.data[1:])
            if channel not in self._opened:
                self._opened.add(channel)  # the port, in two bytes
            elif channel == _DATA:
                self._down = data
            elif channel == _ERROR and data:
                self._failure, self._over = data.decode(errors="replace").strip(), True
        return True

    def _read_local(self) -> bool:
        try:
            data = self._local.recv(_CHUNK)
        except _LATER:
            return False
        if data:
            self._up = ABNF.create_frame(bytes([_DATA]) + data, ABNF.OPCODE_BINARY).format()
        else:
            self._over = True
        return True

    def _answer(self, payload: bytes = b"") -> None:
        self._up += ABNF.create_frame(payload, ABNF.OPCODE_PONG).format()

    def _wait(self, ready: selectors.BaseSelector) -> None:
        for end, reads, writes in (
            (self._local, not self._up, bool(self._down)),
            (self._web.sock, not self._down, bool(self._up)),
        ):
            events = (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if writes else 0)
            known = ready.get_map().get(end)
            if known is not None and known.events != events:
                ready.unregister(end)
                known = None
            if known is None and events:
                ready.register(end, events)
        ready.select()


def _sent(end: Any, data: bytes) -> int:
    try:
        return int(end.send(data))
    except _LATER:
        return 0
