"""The names of a run's keys in Redis. All share the hash tag `{run}`, so a cluster keeps them in one slot for the scripts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from honed.kit.errors import InvalidArgument

PROMPTS: Final = "prompts"
ROLLOUTS: Final = "rollouts"
SCORED: Final = "scored"
SUBMITTED: Final = "submitted"
APPLICATION: Final = "application"
STAGES: Final = (PROMPTS, ROLLOUTS, SCORED)

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}\Z")


def _checked(field: str, name: str) -> str:
    if not _NAME.match(name):
        raise InvalidArgument(
            field, f"{name!r} is not a name: use 1 to 64 of a-z, 0-9 and '-', beginning with a letter or digit"
        )
    return name


@dataclass(frozen=True)
class RunKeys:
    """Names the keys of one run. Stage and lease names follow the same pattern as the run's.

    Raises:
        InvalidArgument: a name does not match `[a-z0-9][a-z0-9-]{0,63}`, which keeps braces and colons out of keys.
    """

    run: str

    def __post_init__(self) -> None:
        _checked("run", self.run)

    def _key(self, *parts: str) -> str:
        return ":".join((f"honed:{{{self.run}}}", *parts))

    def stream(self, stage: str) -> str:
        """The stream of entries that wait for, or are held by, the workers of `stage`."""
        return self._key(_checked("stage", stage))

    def dead(self, stage: str) -> str:
        """The stream of the stage's dead letters."""
        return self._key("dead", _checked("stage", stage))

    def tally(self, stage: str) -> str:
        """A hash of counters: how many entries came into the stage, and how each one left it."""
        return self._key("tally", _checked("stage", stage))

    def failures(self, stage: str) -> str:
        """A hash from entry id to the reason of its last failure, for entries that wait for another try."""
        return self._key("failures", _checked("stage", stage))

    def replayed(self, stage: str) -> str:
        """A hash from a dead letter's id to the entry that it was replayed as; it expires."""
        return self._key("replayed", _checked("stage", stage))

    def answers(self, stage: str, consumer: str) -> str:
        """A hash of answers that this consumer may not have received yet; it expires."""
        return self._key("answers", _checked("stage", stage), consumer)

    def cursor(self) -> str:
        """A hash with the run's place in its sequence of prompts, and who moved it last."""
        return self._key("cursor")

    def inbox(self, source: str) -> str:
        """A stream of prompts of a source (`SUBMITTED` or `APPLICATION`) that wait to be admitted."""
        return self._key("inbox", _checked("source", source))

    def submission(self, digest: str) -> str:
        """The answer to a submission of prompts, by the digest of its idempotency key; it expires."""
        return self._key("submission", digest)

    def lease(self, name: str) -> str:
        """A hash with the holder of a lease; it expires with the lease."""
        return self._key("lease", _checked("lease", name))

    def fence(self, name: str) -> str:
        """A counter that rises each time the lease changes hands; it never expires."""
        return self._key("fence", _checked("lease", name))

    def term(self, name: str) -> str:
        """The highest term in which a lease was taken; it never expires."""
        return self._key("term", _checked("lease", name))

    def members(self, role: str) -> str:
        """A hash of the processes of a service that are there, each with the end of its lease."""
        return self._key("members", _checked("role", role))

    def progress(self) -> str:
        """A hash with what the learner last said of itself."""
        return self._key("progress")

    def identity(self) -> str:
        """What the run is, so that two runs of one name do not mix."""
        return self._key("identity")

    def promotions(self) -> str:
        """A hash with the newest promotion of reward models, and the versions to load."""
        return self._key("promotions")
