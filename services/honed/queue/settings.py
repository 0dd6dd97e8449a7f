"""The run file's sections on Redis Streams, and on the prompts that applications leave there."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from honed.settings import Port, Positive, Seconds, Section, Share


class QueueSettings(Section):
    """Redis Streams between the stages."""

    url: str | None = Field(None, description="redis://host:port/db. Unset: an embedded redis-server with AOF.")
    password: SecretStr | None = Field(None, description="Password for the URL; by environment or password_file.")
    password_file: Path | None = None
    port: Port = Field(0, description="Port of the embedded server.")
    lease_s: Seconds = Field(30.0, description="A consumer silent for longer loses its entries to another.")
    max_deliveries: Positive = Field(5, description="After so many deliveries an entry goes to the dead letters.")
    outage_s: Seconds = Field(120.0, description="How long to ride out a Redis that is gone.")


class ApplicationPromptsSettings(Section):
    """Prompts taken from what applications ask. Off unless `share` is set."""

    share: Share = Field(0.0, description="Of the requests, how many are offered for training.")
    redact: str | None = Field(None, description="A function of the group honed.redactors: text to text or None.")
    limit: Positive = Field(10_000, description="How many wait at most; beyond, the oldest go.")
