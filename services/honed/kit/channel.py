"""How a service calls another: one channel a peer, token and trace on each call, keepalive, retries where they are safe."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from honed.kit import connections, trace_context
from honed.kit.call_spans import begin_call, end_call
from honed.kit.channel_options import CHANNEL_OPTIONS
from honed.kit.renewing_channel import RenewingChannel
from honed.kit.tls import TlsFiles
from honed.kit.trace_context import TraceContext

Continuation = Callable[..., Any]


def connect(address: str, token: str | Callable[[], str] | None = None, tls: TlsFiles | None = None) -> grpc.aio.Channel:
    """Opens a channel whose calls carry the token, and the trace of whoever makes them. Give each call its own `timeout`.

    Args:
        address: `host:port`, or any gRPC target such as `dns:///name:port`.
        token: bearer token, or what returns the one to use now (see `token_source`); None for none.
        tls: certificate files, read again when they are replaced; None for plain text.

    Raises:
        ValueError: a certificate file cannot be read, or there is no name to check certificates by.
    """
    interceptors = _Outgoing.of_every_kind(address, token or None)
    if tls is not None:
        options = (*CHANNEL_OPTIONS, *tls.channel_options(address))

        def secure(credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
            return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)

        return RenewingChannel(tls.renewed_channel_credentials(), secure)
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS, interceptors=interceptors)


class _Outgoing:
    """Adds the `authorization` and the trace to the metadata of each call, and makes spans of unary ones inside of a trace.

    A stream's own span is its server's: gRPC shows the end of a stream to whoever reads it, and an interceptor that read it
    would stand between the call and its caller.
    """

    def __init__(self, address: str, token: str | Callable[[], str] | None) -> None:
        self._address = address
        self._token = token if token is None or callable(token) else lambda: token

    def _carrying(self, details: grpc.aio.ClientCallDetails, trace: TraceContext | None) -> grpc.aio.ClientCallDetails:
        connections.calling(self._address)
        if self._token is None and trace is None:
            return details
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        if self._token is not None:
            metadata.add("authorization", f"Bearer {self._token()}")
        if trace is not None:
            metadata.add(trace_context.HEADER, trace.traceparent)
        return details._replace(metadata=metadata)  # type: ignore[attr-defined, no-any-return]  # a named tuple

    async def plain(self, continuation: Continuation, details: grpc.aio.ClientCallDetails, request: Any) -> Any:
        """A call without a span of its own."""
        return await continuation(self._carrying(details, trace_context.current.get()), request)

    async def spanned(self, continuation: Continuation, details: grpc.aio.ClientCallDetails, request: Any) -> Any:
        """A unary call: its span ends with it."""
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        span, code = begin_call(method, "client"), "CANCELLED"
        if not span.recorded:
            return await self.plain(continuation, details, request)
        call: Any = None
        try:
            call = await continuation(self._carrying(details, span.context), request)
            code = (await call.code()).name
        except asyncio.CancelledError:
            if call is not None:
                call.cancel()  # while the interceptor has not returned, nobody else can
            raise
        finally:
            end_call(span, "client", code)
        return call

    @classmethod
    def of_every_kind(cls, address: str, token: str | Callable[[], str] | None) -> list[grpc.aio.ClientInterceptor]:
        """One interceptor for each of the four kinds of calls, as gRPC wants it."""
        kinds = {
            "intercept_unary_unary": (grpc.aio.UnaryUnaryClientInterceptor, cls.spanned),
            "intercept_unary_stream": (grpc.aio.UnaryStreamClientInterceptor, cls.plain),
            "intercept_stream_unary": (grpc.aio.StreamUnaryClientInterceptor, cls.plain),
            "intercept_stream_stream": (grpc.aio.StreamStreamClientInterceptor, cls.plain),
        }
        return [type(f"_Outgoing_{name}", (cls, base), {name: do})(address, token) for name, (base, do) in kinds.items()]
