"""Waits for what others start: until a probe succeeds, and under an alarm once that takes too long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import grpc

from honed.conductor.launcher import ProcessState
from honed.config import RunSettings
from honed.kit.errors import HonedError, Unavailable
from honed.queue.connection import RetryPolicy
from honed.queue.keys import RunKeys
from honed.queue.members import Members
from honed.runtime import redis_link

POLL_S = 0.5
CALL_TIMEOUT_S = 5.0
_REFUSED: Final = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

Probe = Callable[[], Awaitable[None]]
"""Returns when what is waited for is there; raises HonedError or AioRpcError, which say what is lacking, when it is not."""


async def until(probe: Probe, state: ProcessState, lack: str, timeout_s: float) -> None:
    """Returns when the probe does; after `timeout_s` what is lacking is the state's alarm until then."""
    clock = asyncio.get_running_loop().time
    late = clock() + timeout_s
    while reason := await lacking(probe):
        if clock() >= late:
            state.alarm = f"{lack} ({reason})"
        await asyncio.sleep(POLL_S)
    state.alarm = ""


async def lacking(probe: Probe) -> str:
    """Why the probe fails; empty when it does not."""
    try:
        await probe()
    except grpc.aio.AioRpcError as error:
        if error.code() in _REFUSED:
            return f"{error.details()}; every service needs the same tokens, security.tokens names their directory"
        return error.details() or error.code().name
    except (HonedError, OSError) as error:
        return str(error) or type(error).__name__
    return ""


async def registered(settings: RunSettings, service: str) -> None:
    """Asserts that a process of the service is registered as ready.

    Raises:
        Unavailable: None is, or Redis does not answer.
    """
    async with redis_link(settings, RetryPolicy(CALL_TIMEOUT_S)) as link:
        members = await Members(link, RunKeys(settings.run), service).list()
    if not any(member.ready for member in members):
        raise Unavailable(f"{len(members)} processes are registered, and none of them is ready")
