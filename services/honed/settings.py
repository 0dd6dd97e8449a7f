"""What each section of the run file is made of: the base of all sections, how a service listens, who may call it, its traces.

A room declares its own sections in its `settings` module, which imports nothing but this one, pydantic and other `settings`
modules; `honed.config` puts them together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from honed.kit.address import check_collector, host_port

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of the tree: frozen, strict about its keys, and without numbers that are none or have no end."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class TlsSettings(Section):
    """PEM files for mutual TLS between all services; leave the section out for plain text."""

    authority: Path
    certificate: Path
    key: Path
    server_name: str | None = Field(
        None, description="Name that all certificates carry. Unset: each carries the address that its service is called by."
    )


class SecuritySettings(Section):
    """Who may call."""

    authentication: bool = Field(True, description="Ask for bearer tokens.")
    tokens: Path | None = Field(None, description="Directory of tokens. Unset: <directory>/tokens, made on first use.")
    tls: TlsSettings | None = None


class TelemetrySettings(Section):
    """Traces, by OTLP over gRPC. Off unless a collector is named."""

    otlp_endpoint: str | None = Field(
        None,
        description="http://HOST:4317, or https:// for TLS. Unset: OTEL_EXPORTER_OTLP_ENDPOINT; without that, no traces.",
    )
    sample_ratio: Share = Field(1.0, description="Of the traces that begin with a prompt or a call, how many are recorded.")
    headers_file: Path | None = Field(None, description="Lines `NAME: VALUE` for the collector, a token say.")

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_a_collector(cls, url: str | None) -> str | None:
        if url is not None:
            check_collector(url)
        return url


class ServerSettings(Section):
    """How a service listens. A local launcher replaces port 0 by a free port."""

    host: str = "127.0.0.1"
    port: Port = 0
    health_port: Port = Field(0, description="Plain-text port with the health service alone.")
    metrics_port: Port = Field(0, description="HTTP port of /metrics.")
    address: str | None = Field(None, description="Where others reach the service. Unset: host:port.")
    reflection: bool = True
    deadline_s: Seconds = 600.0
    drain_s: Seconds = 15.0
    linger_s: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Ports stay open so long after SIGTERM with readiness off. Unset: 0 on loopback, 3 elsewhere."
    )
    max_calls: Positive = Field(2048, description="Calls in flight at most; beyond is RESOURCE_EXHAUSTED.")
    max_streams: Positive = Field(1024, description="Calls in flight on one connection at most.")

    @property
    def target(self) -> str:
        """The gRPC target of the service for its callers."""
        return self.address or host_port(self.host, self.port)


class ReplicatedSettings(ServerSettings):
    """A service of which several processes may run. Each one registers itself under a lease; nothing is listed by hand."""

    replicas: Positive = Field(1, description="How many processes the launcher starts.")
    replica: Count = Field(0, description="Which of them this process is; the launcher sets it.")
