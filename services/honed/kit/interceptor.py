"""What happens to every call before and after its handler: request id, token, validation, deadline, errors, metrics."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import protovalidate
from google.protobuf.message import Message

from honed.kit import log, metrics
from honed.kit.errors import HonedError, InvalidArgument
from honed.kit.status import rich_status
from honed.kit.tokens import TokenTable

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # grpcio's classes are generic in its types only
    Context = grpc.aio.ServicerContext[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps each handler of a server. One instance a listener."""

    def __init__(self, tokens: TokenTable | None, deadline_s: float, open_ended: frozenset[str] = frozenset()) -> None:
        """Wraps handlers.

        Args:
            tokens: who may call what; None lets everybody in (a listener behind mutual TLS, or a test).
            deadline_s: the longest that a call may take when its caller set no deadline.
            open_ended: full method names of watches, which have no deadline of ours.
        """
        self._tokens = tokens
        self._deadline_s = deadline_s
        self._open_ended = open_ended
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the handler, wrapped; each method is wrapped once."""
        method: str = handler_call_details.method
        if method not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._wrapped[method] = _wrap(_Method(self, method), handler)
        return self._wrapped[method]

    def timeout(self, method: str, context: Context) -> asyncio.Timeout:
        """The deadline of a call: its caller's, or ours when there is none."""
        if method in self._open_ended:
            return asyncio.timeout(None)
        remaining = context.time_remaining()
        return asyncio.timeout(self._deadline_s if remaining is None else min(remaining, self._deadline_s))

    def authorize(self, method: str, authorization: str | None) -> None:
        """Raises if the caller may not make the call."""
        if self._tokens is not None:
            self._tokens.authorize(authorization, method)


class _Method:
    """One method of a server: what surrounds its handler at each call."""

    def __init__(self, interceptor: CallInterceptor, method: str) -> None:
        self._interceptor = interceptor
        self._method = method
        self._metrics = metrics.MethodMetrics(method)

    def _begin(self, context: Context) -> None:
        metadata = {str(k): v for k, v in context.invocation_metadata() or ()}
        request_id = str(metadata.get("x-request-id") or os.urandom(8).hex())[:128]
        log.request_id.set(request_id)
        authorization = metadata.get("authorization")
        self._interceptor.authorize(self._method, None if authorization is None else str(authorization))

    def unary(self, handler: Any, request_streaming: bool) -> Callable[[Any, Context], Awaitable[Message]]:
        async def serve(request: Any, context: Context) -> Message:
            with self._metrics.observe() as outcome:
                try:
                    self._begin(context)
                    async with self._interceptor.timeout(self._method, context):
                        checked = _validated_stream(request) if request_streaming else _validated(request)
                        response: Message = await handler(checked, context)
                        return response
                except Exception as error:
                    await self._fail(error, context, outcome)

        return serve

    def stream(self, handler: Any, request_streaming: bool) -> Callable[[Any, Context], AsyncIterator[Message]]:
        async def serve(request: Any, context: Context) -> AsyncIterator[Message]:
            with self._metrics.observe() as outcome:
                try:
                    self._begin(context)
                    async with self._interceptor.timeout(self._method, context):
                        checked = _validated_stream(request) if request_streaming else _validated(request)
                        async for response in handler(checked, context):
                            yield response
                except Exception as error:
                    await self._fail(error, context, outcome)

        return serve

    async def _fail(self, error: Exception, context: Context, outcome: metrics.Outcome) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        status = rich_status(error, log.request_id.get())
        outcome.code = status.code.name
        if not isinstance(error, (HonedError, TimeoutError)):
            logger.error("call failed", exc_info=error, extra={"method": self._method})
        await context.abort_with_status(status)
        raise AssertionError("abort_with_status returns never")


def _validated(request: Message) -> Message:
    for violation in protovalidate.collect_violations(request, fail_fast=True):
        path = ".".join(
            element.field_name + (f"[{element.subscript.value}]" if element.subscript else "")
            for element in (violation.proto.field.elements if violation.proto.field else ())
        )
        raise InvalidArgument(path or type(request).__name__, violation.proto.message)
    return request


async def _validated_stream(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
    async for request in requests:
        yield _validated(request)


def _wrap(method: _Method, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    if handler.request_streaming and handler.response_streaming:
        return _remake(grpc.stream_stream_rpc_method_handler, handler, method.stream(handler.stream_stream, True))
    if handler.response_streaming:
        return _remake(grpc.unary_stream_rpc_method_handler, handler, method.stream(handler.unary_stream, False))
    if handler.request_streaming:
        return _remake(grpc.stream_unary_rpc_method_handler, handler, method.unary(handler.stream_unary, True))
    return _remake(grpc.unary_unary_rpc_method_handler, handler, method.unary(handler.unary_unary, False))


def _remake(factory: Any, handler: grpc.RpcMethodHandler[Any, Any], behavior: Any) -> grpc.RpcMethodHandler[Any, Any]:
    made: grpc.RpcMethodHandler[Any, Any] = factory(
        behavior,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return made
