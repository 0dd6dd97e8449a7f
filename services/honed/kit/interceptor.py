"""What happens to every call around its handler: ids, token, decoding, validation, deadline, errors, metrics, span, audit.

A caller is checked by the call's metadata, before any of its message is read: whoever has no token cannot make a server read
or parse anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import protovalidate
from google.protobuf.message import DecodeError, Message

from honed.kit import audit, log, metrics, trace_context, tracing
from honed.kit.call_spans import begin_call, end_call
from honed.kit.errors import HonedError, InvalidArgument, PermissionDenied, Unavailable, root_cause
from honed.kit.status import rich_status
from honed.kit.tokens import Identity, TokenTable

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # grpcio's classes are generic in its types only
    Context = grpc.aio.ServicerContext[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]

caller: ContextVar[Identity | None] = ContextVar("honed_caller", default=None)
"""Who makes the call that is being served; None where authentication is off."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps each handler of a server. One instance a listener."""

    def __init__(
        self,
        tokens: TokenTable | None,
        deadline_s: float,
        open_ended: frozenset[str] = frozenset(),
        ended_at_stop: frozenset[str] = frozenset(),
    ) -> None:
        """Wraps handlers.

        Args:
            tokens: who may call what; None lets everybody in (a listener behind mutual TLS, or a test).
            deadline_s: the longest that a call may take when its caller set no deadline.
            open_ended: full method names of watches, which have no deadline of ours.
            ended_at_stop: further methods whose streams last as long as their callers like: `end_streams` ends them too.
        """
        self._tokens = tokens
        self._deadline_s = deadline_s
        self._open_ended = open_ended
        self._ended_at_stop = open_ended | ended_at_stop
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._streams: set[asyncio.Timeout] = set()
        self._stopping = False

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the handler, wrapped; or one that refuses the call without reading its message."""
        method: str = handler_call_details.method
        if method not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._wrapped[method] = _wrap(_Method(self, method, traced=method not in self._ended_at_stop), handler)
        metadata = {str(k): v for k, v in handler_call_details.invocation_metadata or ()}
        # The handler runs in this task, so these hold for it.
        log.request_id.set(str(metadata.get("x-request-id") or os.urandom(8).hex())[:128])
        traceparent = metadata.get(trace_context.HEADER)
        trace_context.current.set(trace_context.parse(str(traceparent)) if traceparent else None)
        authorization = metadata.get("authorization")
        try:
            if self._tokens is not None:
                caller.set(self._tokens.authorize(None if authorization is None else str(authorization), method))
        except HonedError as error:
            return _refusal(method, error)
        return self._wrapped[method]

    @contextlib.asynccontextmanager
    async def limited(self, method: str, context: Context) -> AsyncIterator[None]:
        """The deadline of a call: its caller's, or ours when there is none. Streams of a watch end at a stop.

        Raises:
            TimeoutError: the deadline has passed.
            Unavailable: the server stops, and the stream would have no end of its own.
        """
        remaining = context.time_remaining()
        seconds = self._deadline_s if remaining is None else min(remaining, self._deadline_s)
        if method not in self._ended_at_stop:
            async with asyncio.timeout(seconds):
                yield
            return
        try:
            async with asyncio.timeout(None if method in self._open_ended else seconds) as limit:
                self._streams.add(limit)
                if self._stopping:
                    limit.reschedule(asyncio.get_running_loop().time())
                try:
                    yield
                finally:
                    self._streams.discard(limit)
        except TimeoutError:
            if self._stopping:
                raise Unavailable("the service stops, and ends its streams; open the stream again") from None
            raise

    def end_streams(self) -> None:
        """Ends what would go on for ever, now and from now on: a stop must not wait for it."""
        self._stopping = True
        for limit in self._streams:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())


class _Method:
    """One method of a server: what surrounds its handler at each call."""

    def __init__(self, interceptor: CallInterceptor, method: str, *, traced: bool) -> None:
        self._interceptor, self._traced = interceptor, traced
        self._method = method
        self._metrics = metrics.MethodMetrics(method)
        self._audited = audit.is_audited(method)

    def unary(self, handler: Any, request_streaming: bool) -> Callable[[Any, Context], Awaitable[Message]]:
        async def serve(request: Any, context: Context) -> Message:
            with self._observed(request) as outcome:
                try:
                    async with self._interceptor.limited(self._method, context):
                        checked = _validated_stream(request) if request_streaming else _validated(request)
                        response: Message = await handler(checked, context)
                        return response
                except Exception as error:
                    await self._fail(error, context, outcome)

        return serve

    def stream(self, handler: Any, request_streaming: bool) -> Callable[[Any, Context], AsyncIterator[Message]]:
        async def serve(request: Any, context: Context) -> AsyncIterator[Message]:
            with self._observed(request) as outcome:
                try:
                    async with self._interceptor.limited(self._method, context):
                        checked = _validated_stream(request) if request_streaming else _validated(request)
                        async for response in handler(checked, context):
                            yield response
                except Exception as error:
                    await self._fail(error, context, outcome)

        return serve

    @contextlib.contextmanager
    def _observed(self, request: Any) -> Iterator[metrics.Outcome]:
        span = begin_call(self._method, "server") if self._traced else tracing.NOTHING  # a watch lasts as long as it likes
        if span.context is not None:  # one that the ratio turned down too: whoever this calls must not decide anew
            trace_context.current.set(span.context)  # for the task of this call, and no longer
        with self._metrics.observe() as outcome:
            try:
                yield outcome
            except BaseException:
                if outcome.code == "OK":  # its caller left
                    outcome.code = "CANCELLED"
                raise
            finally:
                end_call(span, "server", outcome.code)
                if self._audited:
                    who = caller.get()
                    asked = request if isinstance(request, Message) else None
                    audit.record(self._method, "" if who is None else who.name, outcome.code, asked)

    async def _fail(self, error: Exception, context: Context, outcome: metrics.Outcome) -> NoReturn:
        # Handlers with a task group fail with a group; its first error is what ended the call.
        cause = root_cause(error)
        assert isinstance(cause, Exception), "an ExceptionGroup holds no other"
        if isinstance(cause, grpc.aio.AbortError):
            outcome.code = grpc.StatusCode.ABORTED.name
            raise cause
        status = rich_status(cause, log.request_id.get())
        outcome.code = status.code.name
        if not isinstance(cause, (HonedError, TimeoutError)):
            logger.error("call failed", exc_info=error, extra={"method": self._method})
        await context.abort_with_status(status)
        raise AssertionError("abort_with_status returns never")


class _Undecodable:
    """Stands for a message whose bytes are none of its type, until the call can be answered."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _validated(request: Any) -> Message:
    if isinstance(request, _Undecodable):
        raise InvalidArgument("request", request.reason)
    for violation in protovalidate.collect_violations(request, fail_fast=True):
        path = ".".join(
            element.field_name + (f"[{element.subscript.value}]" if element.subscript else "")
            for element in (violation.proto.field.elements if violation.proto.field else ())
        )
        raise InvalidArgument(path or type(request).__name__, violation.proto.message)
    message: Message = request
    return message


async def _validated_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Message]:
    async for request in requests:
        yield _validated(request)


def _refusal(method: str, error: HonedError) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that ends the call. Of the stream-stream kind, whatever the method is: gRPC then reads no message first."""
    status = rich_status(error, log.request_id.get())

    async def refuse(_requests: object, context: Context) -> None:
        with metrics.MethodMetrics(method).observe() as outcome:
            outcome.code = status.code.name
            await context.abort_with_status(status)

    if audit.is_audited(method) and isinstance(error, PermissionDenied):
        audit.record(method, error.caller, status.code.name, None)
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(refuse)
    return handler


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
        request_deserializer=_decoder(handler.request_deserializer),
        response_serializer=handler.response_serializer,
    )
    return made


def _decoder(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Decodes a message. Where gRPC would answer UNKNOWN with the library's text, `_validated` gets a value that it refuses."""
    if decode is None:
        return None

    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except (DecodeError, ValueError):
            return _Undecodable(f"these {len(data)} bytes are no message of the contract; encode it by the stubs of honed.v1")

    return decoded
