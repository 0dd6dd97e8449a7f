"""Notices an engine that has work and gives nothing: its process must be started anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from honed.generation.engine import GenerationEngine
from honed.generation.gate import RequestGate
from honed.kit.errors import Unavailable

_LOOKS: Final = 8
"""How often it looks within the time that is allowed."""


class StallWatch:
    """Watches the tokens of what is in the engine.

    A pause and a change of weights shut the gate, and are no stall. Nor is a stream whose caller does not read: it leaves the
    gate when the engine has ended it.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        gate: RequestGate,
        stall_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`stall_s` is how long there may be work and no token."""
        self._engine, self._gate, self._stall_s = engine, gate, stall_s
        self._clock, self._sleep = clock, sleep

    async def run(self) -> None:
        """Watches for ever.

        Raises:
            Unavailable: The engine stands still.
        """
        seen, since = self._engine.progress, self._clock()
        while True:
            await self._sleep(self._stall_s / _LOOKS)
            now = self._engine.progress
            if now != seen or not self._gate.running or self._gate.is_shut:
                seen, since = now, self._clock()
            elif self._clock() - since >= self._stall_s:
                raise Unavailable(
                    f"the engine has {self._gate.running} samples in work and gave no token for {self._stall_s:g} s "
                    "(generation.stall_s): the process ends, to be started anew"
                )
