"""The Lease `honed-conductor`: of the conductors in a namespace, one drives the run.

The Lease's `leaseTransitions` is the holder's number. It rises with each holder, and goes to Redis as the term of the
run's lease there (`honed.queue.lease`): the queue takes nothing from a conductor that was chosen earlier. So a holder
goes on while the API server is away, when nobody else can be chosen either. Should another one be chosen all the same,
because only this process cannot reach the server, the queue refuses this one.

Clocks of two machines are never compared. A Lease has run out when it has not changed for its duration by the clock of
whoever waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

from honed.conductor.cluster.api import LEASES, Api, ApiUnavailable, Object
from honed.conductor.leadership import Say
from honed.conductor.settings import KubernetesSettings
from honed.kit.aio import background
from honed.kit.errors import Conflict, FailedPrecondition, HonedError, NotFound

logger = logging.getLogger(__name__)

NAME: Final = "honed-conductor"
_RENEWALS_PER_LIFE: Final = 3
_LOOKS_PER_LIFE: Final = 10
_RELEASE_TIMEOUT_S: Final = 5.0


class LeaseTaken(FailedPrecondition):
    """Another conductor has been chosen."""


class ClusterLease:
    """Holds the Lease for one process. See `honed.conductor.leadership` for what its callers may expect."""

    def __init__(self, api: Api, settings: KubernetesSettings, clock: Callable[[], float] = time.monotonic) -> None:
        """Asks for nothing yet; `clock` gives seconds."""
        self._api, self._life_s, self._clock = api, settings.lease_s, clock
        self.identity = settings.identity or f"{socket.gethostname()}_{uuid.uuid4()}"
        self._lease: Object = {}
        self._one_at_a_time = asyncio.Lock()
        self._doubted = asyncio.Event()

    @property
    def number(self) -> int:
        """The number of this holder."""
        return _number(self._lease)

    @asynccontextmanager
    async def held(self, on_wait: Say, on_outage: Say) -> AsyncIterator[None]:
        """See `Leadership`; raises LeaseTaken."""
        await self._acquire(on_wait)
        logger.info("holding the Lease", extra={"lease": NAME, "holder": self.identity, "number": self.number})
        try:
            async with background(self._renew_for_ever(on_outage)):
                yield
        finally:
            # For the successor's sake, also after a failure; without the API the Lease runs out by itself.
            with contextlib.suppress(HonedError, TimeoutError):
                async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                    await self._change({"holderIdentity": None, "leaseDurationSeconds": 1})

    async def above(self, seen: int) -> int:
        """See `Leadership`; raises LeaseTaken."""
        if seen > self.number:
            await self._change({"leaseTransitions": seen + 1})
            logger.warning("the Lease's number had fallen behind the queue's", extra={"seen": seen, "number": self.number})
        return self.number

    def doubt(self) -> None:
        """See `Leadership`."""
        self._doubted.set()

    async def _acquire(self, on_wait: Say) -> None:
        seen: object = None
        since, reason = self._clock(), ""
        while True:
            pause_s = self._life_s / _LOOKS_PER_LIFE
            try:
                found = await self._found()
                if found is None:
                    self._lease = await self._api.create(LEASES, self._new(number=1))
                    return
                spec = found.get("spec") or {}
                if (now := (spec.get("holderIdentity"), spec.get("renewTime"), _number(found))) != seen:
                    seen, since = now, self._clock()
                life_s = float(spec.get("leaseDurationSeconds") or self._life_s)
                # A holder of this identity is an earlier process of this pod, which has ended.
                if spec.get("holderIdentity") in (None, "", self.identity) or self._clock() - since >= life_s:
                    self._lease = await self._api.replace(LEASES, self._with(found, self._claim(_number(found) + 1)))
                    return
                told = f"the Lease {NAME} is held by {spec['holderIdentity']} with number {_number(found)}"
            except (Conflict, NotFound) as error:
                told = f"the Lease {NAME} has just changed: {error}"  # another one was faster
            except ApiUnavailable as error:
                told, pause_s = str(error), max(pause_s, error.retry_after_s or 0.0)
            if told != reason:  # once: a wait may last for days
                logger.info("standing by", extra={"reason": told})
            reason = told
            on_wait(told)
            await asyncio.sleep(pause_s)

    async def _renew_for_ever(self, on_outage: Say) -> NoReturn:
        every_s = self._life_s / _RENEWALS_PER_LIFE
        renewed, told = self._clock(), False
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._doubted.wait(), every_s)
            self._doubted.clear()
            try:
                # Three calls, each with a deadline of its own, where somebody else has changed the Lease.
                async with asyncio.timeout(limit_s := max(every_s, self._life_s - (self._clock() - renewed))):
                    await self._change({})
            except LeaseTaken:
                raise
            except (HonedError, TimeoutError) as error:  # whatever it refuses: the queue knows who was chosen
                reason = str(error) or f"no answer within {limit_s:.1f} s"
                logger.warning("the Lease is not renewed", extra={"reason": reason})
                if self._clock() - renewed > self._life_s:
                    told = True
                    on_outage(f"the Lease {NAME} has run out and cannot be renewed: {reason}")
            else:
                renewed = self._clock()
                if told:
                    told = False
                    on_outage("")

    async def _change(self, change: Object) -> None:
        """Renews the Lease, with a change of its specification.

        Raises:
            LeaseTaken: Another one holds it.
        """
        async with self._one_at_a_time:
            while True:
                wanted = self._with(self._lease, {**self._claim(self.number), **change})
                with contextlib.suppress(Conflict, NotFound):
                    self._lease = await self._api.replace(LEASES, wanted)
                    return
                # An answer was lost, somebody has set a label, or another one has taken it.
                found = await self._found()
                if found is None:  # deleted by a person; whoever is faster has it now
                    with contextlib.suppress(Conflict):
                        self._lease = await self._api.create(LEASES, self._new(self.number))
                    continue
                holder = (found.get("spec") or {}).get("holderIdentity")
                if holder != self.identity or _number(found) not in (self.number, wanted["spec"]["leaseTransitions"]):
                    raise LeaseTaken(
                        f"the Lease {NAME} went to {holder or 'nobody'} with number {_number(found)}, and this conductor had "
                        f"number {self.number}: another one drives the run, and this process ends"
                    )
                self._lease = found

    async def _found(self) -> Object | None:
        try:
            return await self._api.get(LEASES, NAME)
        except NotFound:
            return None

    def _new(self, number: int) -> Object:
        labels = {"app.kubernetes.io/name": "honed", "app.kubernetes.io/component": "conductor"}
        metadata = {"name": NAME, "labels": labels}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": self._claim(number)}

    def _claim(self, number: int) -> Object:
        now = datetime.now(tz=UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        claim: dict[str, Any] = {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": math.ceil(self._life_s),
            "leaseTransitions": number,
            "renewTime": now,
        }
        held = self._lease.get("spec") or {}
        claim["acquireTime"] = held.get("acquireTime", now) if number == self.number else now
        return claim

    @staticmethod
    def _with(lease: Object, change: Object) -> Object:
        spec = {**(lease.get("spec") or {}), **change}
        return {**lease, "spec": {key: value for key, value in spec.items() if value is not None}}


def _number(lease: Object) -> int:
    return int((lease.get("spec") or {}).get("leaseTransitions") or 0)
