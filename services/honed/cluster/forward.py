"""A port of this machine that leads to a ready Pod of the run, whichever is there when a connection is made."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from typing import Final, Self

from honed.cluster.api import Cluster
from honed.cluster.pods import Pod, list_pods, none_ready
from honed.cluster.portforward import Stream, open_stream
from honed.kit.address import host_port
from honed.kit.errors import HonedError, NotFound, Unavailable

_MOST: Final = 64
_PATIENCE_S: Final = 15.0
_AGAIN_S: Final = 0.5
_REASON_S: Final = 2.0
"""What the words of an error may take: the call that failed has used up its time."""
_END_S: Final = 5.0
_HERE: Final = "127.0.0.1"


class Forward:
    """Listens on loopback, on `port`; each connection becomes a stream into a Pod.

    Invariants: a connection stays with its Pod. When that Pod goes, the connection ends, and the next one goes to another.
    At most `_MOST` streams are open. A connection that finds no ready Pod in `_PATIENCE_S` is closed, and `trouble` says why.
    """

    def __init__(self, cluster: Cluster, component: str, port: str, pods: Sequence[Pod], *, pinned: bool = False) -> None:
        """Listens from here on.

        Args:
            cluster: where the Pods are.
            component: whose Pods.
            port: name of the port.
            pods: those that are known now.
            pinned: only these Pods; otherwise newer ones are looked for when none of them answers.
        """
        self.cluster, self.component = cluster, component
        self.trouble = ""
        self._port, self._pods, self._pinned = port, list(pods), pinned
        self._used, self._pod, self._failed = False, "", ""
        self._streams: set[Stream] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._room = threading.Semaphore(_MOST)
        self._listener = socket.create_server((_HERE, 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name=f"honed forward {component}", daemon=True)
        self._accepting.start()

    @property
    def address(self) -> str:
        """`host:port` on this machine."""
        return host_port(_HERE, self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every stream, and listens no more."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(OSError):  # wakes `accept`, which no other call does on every system
            socket.create_connection((_HERE, self.port), timeout=_END_S).close()
        self._accepting.join(_END_S)
        self._listener.close()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.end()

    def reason(self) -> str:
        """Why a call over this port failed: that no Pod is ready, or what the last connection ended with.

        Takes `_REASON_S` seconds at most, also where the API server does not answer.
        """
        try:
            with self.cluster.briefly(_REASON_S) as cluster:
                pods = list_pods(cluster, self.component)
                if not any(pod.ready for pod in pods):
                    return str(none_ready(cluster, self.component, pods))
        except HonedError as error:
            return "; ".join(dict.fromkeys(filter(None, (self.trouble, str(error)))))
        return self.trouble or f"the connection to {self._pod or 'its Pod'} was lost"

    def _accept(self) -> None:
        while True:
            try:
                local, _ = self._listener.accept()
            except OSError:
                return
            if self._closed.is_set():
                local.close()
                return
            if not self._room.acquire(blocking=False):
                self.trouble = f"{_MOST} connections to {self.component} are open already"
                local.close()
                continue
            threading.Thread(target=self._serve, args=(local,), name=f"honed stream {self.component}", daemon=True).start()

    def _serve(self, local: socket.socket) -> None:
        try:
            pod, stream = self._open(local)
        except HonedError as error:
            self.trouble = str(error)
            local.close()
        else:
            if failure := stream.run():
                self._failed, self.trouble = pod, f"{pod}: {failure}"
            with self._lock:
                self._streams.discard(stream)
        finally:
            self._room.release()

    def _open(self, local: socket.socket) -> tuple[str, Stream]:
        """A stream into a ready Pod, with the Pod's name.

        Raises:
            HonedError: there is none within the time, or the API server refuses.
        """
        end = time.monotonic() + _PATIENCE_S
        while True:
            failure: HonedError | None = None
            try:
                if self._used and not self._pinned:
                    with self.cluster.briefly(max(_AGAIN_S, end - time.monotonic())) as cluster:
                        self._pods = list_pods(cluster, self.component)
                self._used = True
                # One that has just failed may be called ready for a while yet.
                for pod in sorted(self._pods, key=lambda pod: pod.name == self._failed):
                    if pod.ready:
                        return pod.name, self._stream(pod, local)
            except (Unavailable, NotFound) as error:
                failure = error
            if self._pinned or time.monotonic() >= end or self._closed.wait(_AGAIN_S):
                if failure is not None:
                    raise failure
                with self.cluster.briefly(_REASON_S) as cluster:
                    raise none_ready(cluster, self.component, self._pods)

    def _stream(self, pod: Pod, local: socket.socket) -> Stream:
        try:
            stream = Stream(open_stream(self.cluster, pod.name, pod.port(self._port)), local)
        except HonedError:
            self._failed = pod.name
            raise
        with self._lock:
            self._streams.add(stream)
            self._pod, self.trouble = pod.name, ""
        if self._closed.is_set():
            stream.end()
        return stream
