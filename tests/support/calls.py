"""What a failed call says, taken apart."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status


async def failure(call: Awaitable[Any]) -> tuple[grpc.aio.AioRpcError, dict[str, Any]]:
    """Awaits a call that must fail: its error, and the error's details by the name of their kind."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    details: dict[str, Any] = {}
    status = rpc_status.from_call(_SyncView(caught.value))
    for detail in status.details if status else ():
        kind = getattr(error_details_pb2, detail.type_url.rsplit(".", 1)[1])()
        detail.Unpack(kind)
        details[kind.DESCRIPTOR.name] = kind
    return caught.value, details


class _SyncView:
    """grpc_status reads a call's parts by methods that the asyncio error shares."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.details, self.trailing_metadata = error.code, error.details, error.trailing_metadata
