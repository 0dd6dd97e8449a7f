"""A kit server on a free port of this machine, with the tokens of a local run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from honed.kit.channel import connect
from honed.kit.server import Listener, Server, ServerOptions, Servicer
from honed.kit.tokens import TokenTable, ensure_local_tokens, read_token


def local_table(tokens: Path) -> TokenTable:
    """The table of a local run's tokens, made in `tokens`."""
    ensure_local_tokens(tokens)
    return TokenTable.load(tokens / "table.json")


def open_channel(server: Server, tokens: Path | None = None, name: str = "operator") -> grpc.aio.Channel:
    """A channel to a server's first port; with `tokens`, under the token of that name."""
    return connect(f"127.0.0.1:{server.ports[0]}", None if tokens is None else read_token(tokens / f"{name}.token"))


@asynccontextmanager
async def serving(servicers: list[Servicer], **options: Any) -> AsyncIterator[Server]:
    """Serves on one listener for the length of the block."""
    server = Server([Listener("127.0.0.1", 0, servicers)], ServerOptions(**{"drain_s": 2.0, **options}))
    await server.start()
    await server.ready()
    try:
        yield server
    finally:
        await server.stop()
