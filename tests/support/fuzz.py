"""Random bytes and random messages for every call of a service, and the codes that come back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

BROKEN = b"\xff\xff\xff\xff"
"""No message of any type: a field's tag that does not end."""

FAULTS = frozenset({"UNKNOWN", "INTERNAL"})
"""What a caller must never get for anything that it sent."""

TEXTS = ("", "a", "run", "1.5", "\0", "\x1b[2J", "\u03bb\U0001f600", "../../etc/passwd", "x" * 300, "%s{}'\"--", "honed-canary")
NUMBERS = (0, 1, 2, 5, 127, 2**31 - 1)
REALS = (0.0, 1.0, -1.0, 0.7, 1e30, float("nan"), float("inf"))

_F = FieldDescriptor


@dataclass(frozen=True)
class Sent:
    """One request and the name of the code that it got."""

    method: str
    sent: str
    code: str


async def fuzz(
    channel: grpc.aio.Channel,
    service: ServiceDescriptor,
    rng: random.Random,
    rounds: int,
    only: Sequence[str] = (),
    examples: Sequence[Message] = (),
) -> list[Sent]:
    """Sends `rounds` random messages and as many random bytes to each call, or to the calls named in `only`.

    A random message breaks most rules at once. `examples` are good requests, of any calls: each round also sends one with a
    single field changed.
    """
    good = {example.DESCRIPTOR.full_name: example for example in examples}
    found = []
    for method in service.methods:
        if only and method.name not in only:
            continue
        for payload, sent in _payloads(method, rng, rounds, good.get(method.input_type.full_name)):
            found.append(Sent(method.full_name, sent, await _code(channel, method, payload)))
    return found


async def broken(channel: grpc.aio.Channel, service: ServiceDescriptor) -> dict[str, str]:
    """The code of each call for bytes that are no message."""
    return {method.full_name: await _code(channel, method, BROKEN) for method in service.methods}


def random_message(of: Descriptor, rng: random.Random, depth: int = 0) -> Message:
    """A message with about half of its fields set, to plain and to strange values."""
    message: Any = message_factory.GetMessageClass(of)()
    for field in of.fields:
        if rng.random() < 0.5 or (field.message_type is not None and depth > 5):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            if value.message_type is None:
                getattr(message, field.name)[_key(field, rng)] = _scalar(value, rng)
        elif field.is_repeated:
            for _ in range(rng.randrange(4)):
                if field.message_type is not None:
                    getattr(message, field.name).append(random_message(field.message_type, rng, depth + 1))
                else:
                    getattr(message, field.name).append(_scalar(field, rng))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(random_message(field.message_type, rng, depth + 1))
        else:
            setattr(message, field.name, _scalar(field, rng))
    return message


def changed(example: Message, rng: random.Random) -> Message:
    """A copy with one field, somewhere inside, removed or set to a random value."""
    message: Any = message_factory.GetMessageClass(example.DESCRIPTOR)()
    message.CopyFrom(example)
    field = rng.choice(list(message.DESCRIPTOR.fields))
    if field.message_type is not None and not field.is_repeated and rng.random() < 0.7:
        getattr(message, field.name).CopyFrom(changed(getattr(message, field.name), rng))
        return message  # type: ignore[no-any-return]
    other: Any = random_message(message.DESCRIPTOR, rng)
    for unwanted in message.DESCRIPTOR.fields:
        (message if unwanted is field else other).ClearField(unwanted.name)
    message.MergeFrom(other)
    return message  # type: ignore[no-any-return]


def _payloads(
    method: MethodDescriptor, rng: random.Random, rounds: int, example: Message | None
) -> Iterator[tuple[bytes, str]]:
    for _ in range(rounds):
        if example is not None:
            near = changed(example, rng)
            yield near.SerializeToString(), f"{near!s}"[:500]
        message = random_message(method.input_type, rng)
        yield message.SerializeToString(), f"{message!s}"[:500]
        noise = rng.randbytes(rng.randrange(1, 200))
        yield noise, noise.hex()
    yield b"", "nothing"


async def _code(channel: grpc.aio.Channel, method: MethodDescriptor, payload: bytes) -> str:
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        async with asyncio.timeout(10):
            if method.server_streaming:
                call = channel.stream_stream(path)(iter([payload]), timeout=5)
                for _ in range(3):  # a watch goes on
                    if await call.read() is grpc.aio.EOF:
                        break
                call.cancel()
            else:
                await channel.stream_unary(path)(iter([payload]), timeout=5)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def _key(field: FieldDescriptor, rng: random.Random) -> Any:
    return _scalar(field.message_type.fields_by_name["key"], rng)


def _scalar(field: FieldDescriptor, rng: random.Random) -> Any:
    match field.cpp_type:
        case _F.CPPTYPE_STRING:
            return rng.randbytes(rng.randrange(40)) if field.type == _F.TYPE_BYTES else rng.choice(TEXTS)
        case _F.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case _F.CPPTYPE_ENUM:
            return rng.choice([value.number for value in field.enum_type.values] + [99])
        case _F.CPPTYPE_DOUBLE | _F.CPPTYPE_FLOAT:
            return rng.choice(REALS)
        case _F.CPPTYPE_INT32 | _F.CPPTYPE_INT64:
            return rng.choice((*NUMBERS, -1))
        case _:
            return rng.choice(NUMBERS)
