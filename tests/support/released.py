"""A peer of the last release: it knows `protos/released.binpb` and nothing that came after."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

FILE = Path(__file__).parents[2] / "protos" / "released.binpb"


class Released:
    """The released contract."""

    def __init__(self) -> None:
        files = descriptor_pb2.FileDescriptorSet.FromString(FILE.read_bytes())
        self._pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self._pool.Add(file)

    def through(self, body: bytes, name: str) -> bytes:
        """What is left of a message that a peer of the last release has read and written again."""
        return self._knows(body, message_factory.GetMessageClass(self._pool.FindMessageTypeByName(name)))

    def method(self, path: str) -> Any:
        """The descriptor of `/package.Service/Method`; KeyError if the release has none."""
        service, _, name = path.lstrip("/").rpartition("/")
        return self._pool.FindServiceByName(service).methods_by_name[name]

    @staticmethod
    def _knows(body: bytes, kind: Any) -> bytes:
        message = kind.FromString(body)
        message.DiscardUnknownFields()
        return bytes(message.SerializeToString())

    @asynccontextmanager
    async def before(self, address: str) -> AsyncIterator[str]:
        """Yields the address of a proxy that hands calls on to `address`, less what the release does not know."""
        async with grpc.aio.insecure_channel(address) as channel:
            server = grpc.aio.server()
            server.add_generic_rpc_handlers((_Proxy(self, channel),))
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            try:
                yield f"127.0.0.1:{port}"
            finally:
                await server.stop(1)


class _Proxy(grpc.GenericRpcHandler):
    def __init__(self, released: Released, channel: grpc.aio.Channel) -> None:
        self._released, self._channel = released, channel

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        try:
            method = self._released.method(details.method)
        except KeyError:
            return None  # UNIMPLEMENTED, as from a server of the release
        asked, answered = method.input_type.full_name, method.output_type.full_name

        def less(body: bytes) -> bytes:
            return self._released.through(body, asked)

        def call(kind: str, request: Any, context: Any) -> Any:  # a request, or an iterator of them
            make = getattr(self._channel, kind)(details.method)
            return make(request, metadata=_metadata(context), timeout=context.time_remaining())

        def whole(kind: str) -> Any:
            async def handler(request: Any, context: Any) -> bytes:
                try:
                    return self._released.through(await call(kind, request, context), answered)
                except grpc.aio.AioRpcError as error:
                    return await _refused(error, context)

            return handler

        def streamed(kind: str) -> Any:
            async def handler(request: Any, context: Any) -> AsyncIterator[bytes]:
                try:
                    async for message in call(kind, request, context):
                        yield self._released.through(message, answered)
                except grpc.aio.AioRpcError as error:
                    await _refused(error, context)

            return handler

        kind = f"{_many(method.client_streaming)}_{_many(method.server_streaming)}"
        handler = (streamed if method.server_streaming else whole)(kind)
        return getattr(grpc, f"{kind}_rpc_method_handler")(handler, request_deserializer=less)


def _many(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _metadata(context: Any) -> Any:
    return [(key, value) for key, value in context.invocation_metadata() if key in ("authorization", "x-request-id")]


async def _refused(error: grpc.aio.AioRpcError, context: Any) -> Any:
    await context.abort(error.code(), error.details(), tuple(error.trailing_metadata() or ()))
