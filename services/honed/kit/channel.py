"""How a service calls another: one channel a peer, a token on each call, keepalive, retries only where they are safe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from honed.kit.channel_options import CHANNEL_OPTIONS
from honed.kit.renewing_channel import RenewingChannel
from honed.kit.tls import TlsFiles


def connect(address: str, token: str | Callable[[], str] | None = None, tls: TlsFiles | None = None) -> grpc.aio.Channel:
    """Opens a channel whose calls carry the token. Give each call its own `timeout`.

    Args:
        address: `host:port`, or any gRPC target such as `dns:///name:port`.
        token: bearer token, or what returns the one to use now (see `token_source`); None for none.
        tls: certificate files, read again when they are replaced; None for plain text.

    Raises:
        ValueError: a certificate file cannot be read, or there is no name to check certificates by.
    """
    interceptors = _Token.of_every_kind(token) if token else []
    if tls is not None:
        options = (*CHANNEL_OPTIONS, *tls.channel_options(address))

        def secure(credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
            return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)

        return RenewingChannel(tls.renewed_channel_credentials(), secure)
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS, interceptors=interceptors)


class _Token:
    """Adds the `authorization` metadata to a call."""

    def __init__(self, token: str | Callable[[], str]) -> None:
        self._token = token if callable(token) else lambda: token

    def _with_token(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        metadata.add("authorization", f"Bearer {self._token()}")
        return details._replace(metadata=metadata)  # type: ignore[attr-defined, no-any-return]  # a named tuple

    @classmethod
    def of_every_kind(cls, token: str | Callable[[], str]) -> list[grpc.aio.ClientInterceptor]:
        """One interceptor for each of the four kinds of calls, as gRPC wants it."""

        async def add(self: _Token, continuation: Callable[..., Any], details: grpc.aio.ClientCallDetails, request: Any) -> Any:
            return await continuation(self._with_token(details), request)

        kinds = {
            "intercept_unary_unary": grpc.aio.UnaryUnaryClientInterceptor,
            "intercept_unary_stream": grpc.aio.UnaryStreamClientInterceptor,
            "intercept_stream_unary": grpc.aio.StreamUnaryClientInterceptor,
            "intercept_stream_stream": grpc.aio.StreamStreamClientInterceptor,
        }
        return [type(f"_Token_{name}", (cls, base), {name: add})(token) for name, base in kinds.items()]
