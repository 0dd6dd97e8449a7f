"""Whose run this is: two runs of one name on one Redis are told apart before they mix."""

from __future__ import annotations

from honed.kit.errors import FailedPrecondition
from honed.queue.connection import RedisLink
from honed.queue.keys import RunKeys
from honed.queue.scripts import Scripts


class RunIdentity:
    """What a run is, as its processes agree on it in Redis: the digest of the manifest of its base version 0.0."""

    def __init__(self, link: RedisLink, keys: RunKeys) -> None:
        self._run = keys.run
        self._key = keys.identity()
        self._scripts = Scripts(link, "registry.lua")

    async def check(self, base_digest: str) -> None:
        """Says what this process takes the run for; the first to say so decides.

        Call it at the start, before the process takes or adds any work, and again now and then: a Redis that lost
        everything is told anew.

        Raises:
            FailedPrecondition: in this Redis the name belongs to a run of another base version.
        """
        found = await self._scripts.run("identify", [self._key], [base_digest])
        if (theirs := found.decode()) != base_digest:
            raise FailedPrecondition(
                f"two runs have the name {self._run!r} on one Redis: this process has the base version {base_digest}, the "
                f"run there {theirs}. Give one of them another `run`, or another queue.url; if the run there is over, "
                f"delete its keys (honed:{{{self._run}}}:*)"
            )
