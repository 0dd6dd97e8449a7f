"""One service as a synchronous client sees it: each call has a deadline, a request id and the token, and waits out overload."""

from __future__ import annotations

import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import grpc

from honed._client.errors import RequestError, request_error
from honed.kit.channel_options import CHANNEL_OPTIONS
from honed.kit.tls import ChannelTls
from honed.kit.trace_context import HEADER, TraceContext

T = TypeVar("T")

_AGAIN_S: Final = 1.0  # the pause before a large upload goes to a service that was gone
_JITTER: Final = 0.25  # so that those who were told the same second do not come back in the same one


def _trace_of_application() -> tuple[tuple[str, str], ...]:
    """The application's own trace, if it uses OpenTelemetry and is inside of a span: the call then belongs to it.

    Nothing is imported for it. An application without OpenTelemetry is in no span.
    """
    api = sys.modules.get("opentelemetry.trace")
    if api is None or not (found := api.get_current_span().get_span_context()).is_valid:
        return ()
    here = TraceContext(f"{found.trace_id:032x}", f"{found.span_id:016x}", bool(found.trace_flags.sampled))
    return ((HEADER, here.traceparent),)


@dataclass(frozen=True)
class Environment:
    """Where a peer gets time, ids and jitter from; tests bring their own.

    Attributes:
        clock: seconds, monotonic.
        sleep: waits so many seconds.
        new_id: a name that nobody has used.
        share: a random number from 0 to 1.
    """

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex
    share: Callable[[], float] = random.random


class Peer:
    """A channel to one service. gRPC itself repeats a call that met UNAVAILABLE before it began, a few times.

    A service that is full says when to come back; the call waits so long and tries again, as far as its deadline allows.

    Attributes:
        refused: whether the last call that failed did so for its token (UNAUTHENTICATED): the channel has no other one.
    """

    def __init__(
        self,
        service: str,
        address: str,
        token: str | None = None,
        tls: ChannelTls | None = None,
        environment: Environment | None = None,
    ) -> None:
        """Opens a channel; the first call connects.

        Args:
            service: name of the service, for errors.
            address: `host:port`, or any gRPC target.
            token: bearer token, None for none.
            tls: certificates; None for plain text.
            environment: time, ids and jitter.
        """
        self.service, self.address, self.refused = service, address, False
        self._environment = environment or Environment()
        self._authorization = (("authorization", f"Bearer {token}"),) if token else ()
        self.channel: grpc.Channel = (
            grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
            if tls is None
            else grpc.secure_channel(
                address, tls.channel_credentials(), options=(*CHANNEL_OPTIONS, *tls.channel_options(address))
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel; calls under way are cancelled."""
        self.channel.close()

    def unary(self, method: Callable[..., T], request: Any, timeout_s: float) -> T:
        """Makes one call.

        Raises:
            RequestError: it failed, or did not end within `timeout_s` seconds, pauses included.
        """
        return self._repeated(lambda **how: method(request, **how), timeout_s, patient=False)

    def upload(self, method: Callable[..., T], requests: Sequence[Any], timeout_s: float) -> T:
        """Streams requests that are safe to repeat as a whole; goes on trying while the service is gone.

        Raises:
            RequestError: it failed, or did not end within `timeout_s` seconds, pauses included.
        """
        return self._repeated(lambda **how: method(iter(requests), **how), timeout_s, patient=True)

    def stream(self, method: Callable[..., Any], request: Any, timeout_s: float) -> Iterator[Any]:
        """Yields what the service streams. Closing the iterator cancels the call.

        Raises:
            RequestError: it failed, or did not end within `timeout_s` seconds.
        """
        end = self._environment.clock() + timeout_s
        while True:
            request_id, begun = self._environment.new_id(), False
            call = method(request, timeout=end - self._environment.clock(), metadata=self._metadata(request_id))
            try:
                for message in call:
                    begun = True
                    yield message
            except grpc.RpcError as error:
                failure = self._failed(error, request_id)
                pause_s = None if begun else self._pause(failure, end, patient=False)
                if pause_s is None:
                    raise failure from error
            else:
                return
            finally:
                call.cancel()
            self._environment.sleep(pause_s)

    def _repeated(self, call: Callable[..., T], timeout_s: float, *, patient: bool) -> T:
        end = self._environment.clock() + timeout_s
        while True:
            request_id = self._environment.new_id()
            try:
                return call(timeout=end - self._environment.clock(), metadata=self._metadata(request_id))
            except grpc.RpcError as error:
                failure = self._failed(error, request_id)
                pause_s = self._pause(failure, end, patient=patient)
                if pause_s is None:
                    raise failure from error
            self._environment.sleep(pause_s)

    def _failed(self, error: grpc.RpcError, request_id: str) -> RequestError:
        """What a failed call becomes for the caller."""
        failure = request_error(error, self.service, self.address, request_id)
        self.refused = failure.code == "UNAUTHENTICATED"
        return failure

    def _metadata(self, request_id: str) -> tuple[tuple[str, str], ...]:
        return (*self._authorization, ("x-request-id", request_id), *_trace_of_application())

    def _pause(self, failure: RequestError, end: float, *, patient: bool) -> float | None:
        """How long to wait before the next try; None when there is no sense in one."""
        if failure.code == "RESOURCE_EXHAUSTED" and failure.retry_after_s is not None:
            wanted_s = failure.retry_after_s
        elif failure.code == "UNAVAILABLE" and patient:
            wanted_s = _AGAIN_S
        else:
            return None
        pause_s = wanted_s * (1 + _JITTER * self._environment.share())
        return pause_s if self._environment.clock() + pause_s < end else None
