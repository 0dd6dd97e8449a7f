"""A channel whose certificate is replaced without a restart.

gRPC fixes a channel's credentials when it is made, and a channel lives as long as its process. So
this one opens another channel when the certificate's files change: calls that begin from then on go
there, calls in flight end where they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self

import grpc

from honed.kit.from_files import FromFiles

GRACE_S = 600.0
"""How long calls on a replaced channel may go on."""


class RenewingChannel(grpc.aio.Channel):
    """The newest channel behind one object. Use it inside an event loop."""

    def __init__(
        self, credentials: FromFiles[grpc.ChannelCredentials], connect: Callable[[grpc.ChannelCredentials], grpc.aio.Channel]
    ) -> None:
        """Opens the first channel.

        Args:
            credentials: of the files as they are now.
            connect: makes a channel with them.
        """
        self._credentials = credentials
        self._connect = connect
        self._used = credentials.get()
        self._channel = connect(self._used)
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> grpc.aio.Channel:
        """The channel for a call that begins now."""
        credentials = self._credentials.get()
        if credentials is not self._used:
            retired, self._used, self._channel = self._channel, credentials, self._connect(credentials)
            closing = asyncio.ensure_future(retired.close(GRACE_S))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        return self._channel

    async def __aenter__(self) -> Self:
        """Returns itself; it is open already."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """Closes it."""
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Closes the channel in use, and those that it replaced."""
        for closing in tuple(self._closing):
            closing.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Of the channel in use."""
        return self.current.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Of the channel in use."""
        await self.current.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Of the channel in use."""
        await self.current.channel_ready()

    def unary_unary(self, *arguments: Any, **named: Any) -> Any:
        """As grpc.aio.Channel."""
        return self._late("unary_unary", arguments, named)

    def unary_stream(self, *arguments: Any, **named: Any) -> Any:
        """As grpc.aio.Channel."""
        return self._late("unary_stream", arguments, named)

    def stream_unary(self, *arguments: Any, **named: Any) -> Any:
        """As grpc.aio.Channel."""
        return self._late("stream_unary", arguments, named)

    def stream_stream(self, *arguments: Any, **named: Any) -> Any:
        """As grpc.aio.Channel."""
        return self._late("stream_stream", arguments, named)

    def _late(self, kind: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Callable[..., Any]:
        """A stub's method that chooses its channel at each call."""

        def call(*request: Any, **options: Any) -> Any:
            return getattr(self.current, kind)(*arguments, **named)(*request, **options)

        return call
