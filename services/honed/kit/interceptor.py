"""What happens to every call before and after its handler: request id, token, validation, deadline, errors, metrics."""

from __future__ import annotations

import asyncio
import logging
import uuid
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

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        call = _Call(self, handler_call_details)
        if handler.request_streaming and handler.response_streaming:
            return _remake(grpc.stream_stream_rpc_method_handler, handler, call.stream(handler.stream_stream, True))
        if handler.response_streaming:
            return _remake(grpc.unary_stream_rpc_method_handler, handler, call.stream(handler.unary_stream, False))
        if handler.request_streaming:
            return _remake(grpc.stream_unary_rpc_method_handler, handler, call.unary(handler.stream_unary, True))
        return _remake(grpc.unary_unary_rpc_method_handler, handler, call.unary(handler.unary_unary, False))

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


class _Call:
    """One call on its way through the interceptor."""

    def __init__(self, interceptor: CallInterceptor, details: grpc.HandlerCallDetails) -> None:
        metadata = {str(k): v for k, v in details.invocation_metadata or ()}
        self._interceptor = interceptor
        self._method: str = details.method
        self._authorization = str(metadata["authorization"]) if "authorization" in metadata else None
        self._request_id = str(metadata.get("x-request-id") or uuid.uuid4().hex)[:128]

    def _begin(self) -> None:
        log.request_id.set(self._request_id)
        self._interceptor.authorize(self._method, self._authorization)

    def unary(self, handler: Any, request_streaming: bool) -> Callable[[Any, Context], Awaitable[Message]]:
        async def serve(request: Any, context: Context) -> Message:
            with metrics.observe(self._method) as outcome:
                try:
                    self._begin()
                    async with self._interceptor.timeout(self._method, context):
                        checked = _validated_stream(request) if request_streaming else _validated(request)
                        response: Message = await handler(checked, context)
                        return response
                except Exception as error:
                    await self._fail(error, context, outcome)

        return serve

    def stream(self, handler: Any, request_streaming: bool) -> Callable[[Any, Context], AsyncIterator[Message]]:
        async def serve(request: Any, context: Context) -> AsyncIterator[Message]:
            with metrics.observe(self._method) as outcome:
                try:
                    self._begin()
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
        status = rich_status(error, self._request_id)
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


def _remake(factory: Any, handler: grpc.RpcMethodHandler[Any, Any], behavior: Any) -> grpc.RpcMethodHandler[Any, Any]:
    made: grpc.RpcMethodHandler[Any, Any] = factory(
        behavior,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return made
