"""What travels between stages: a `Message` goes in, a `Delivery` is what one consumer holds for one lease."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One unit of work.

    Attributes:
        id: The business id, for example the rollout's. The queue carries it and never compares it.
        body: A serialised protobuf message.
        traceparent: The W3C trace context of whoever made it; empty if there is none.
    """

    id: str
    body: bytes
    traceparent: str = ""


@dataclass(frozen=True)
class Delivery:
    """One entry in the hands of one consumer.

    `(entry, consumer, count)` names this very delivery: when the entry is reclaimed the count rises, so whoever held it
    before can tell, and the scripts can tell, that it no longer does.

    Attributes:
        entry: The entry's id in its stream, for example `1718000000000-0`.
        message: What was put in.
        count: How often the entry has been delivered, this time included.
        consumer: Who holds it.
        stage: The stage whose stream it came from.
    """

    entry: str
    message: Message
    count: int
    consumer: str
    stage: str


def as_arguments(messages: Iterable[Message]) -> list[str | bytes]:
    """Flattens messages for a script: id, body, traceparent, id, body, ..."""
    return [part for message in messages for part in (message.id, message.body, message.traceparent)]


def from_fields(fields: Mapping[bytes, bytes]) -> Message:
    """Reads a message from a stream entry's fields."""
    return Message(
        id=fields.get(b"id", b"").decode(),
        body=fields.get(b"body", b""),
        traceparent=fields.get(b"traceparent", b"").decode(),
    )


def from_row(row: Sequence[bytes | int], consumer: str, stage: str) -> Delivery:
    """Reads a delivery from a script's row: entry, count, then the flat fields."""
    entry, count, *flat = row
    pairs = iter(flat)
    fields = {bytes(name): bytes(value) for name, value in zip(pairs, pairs, strict=True)}
    return Delivery(bytes(entry).decode(), from_fields(fields), int(count), consumer, stage)
