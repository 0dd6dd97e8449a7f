"""A rollout in the learner's hands, and the groups that rollouts come in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from honed.learner.data.episode import Episode
from honed.queue.messages import Delivery

_REFUSED_KEPT: Final = 4096  # groups; one whose others come later than that is given up by its time


@dataclass(frozen=True)
class Held:
    """A rollout in the learner's hands. Implements `InHand`.

    Attributes:
        delivery: As it came first; the intake knows the newest delivery of each.
        episode: What trains.
        scorers: Version of each scorer by name.
    """

    delivery: Delivery
    episode: Episode
    scorers: Mapping[str, str] = field(default_factory=dict)

    @property
    def rollout_id(self) -> str:
        """The rollout's id."""
        return self.episode.rollout_id

    @property
    def example(self) -> Episode:
        """See `InHand`."""
        return self.episode

    def staleness(self, step: int) -> int:
        """Versions between the oldest token and the learner at `step`.

        A rollout of an update that a resumed learner has yet to make again is not stale: 0.
        """
        return max(0, step - min(span.version.step for span in self.episode.spans))

    def is_abandoned(self, rollbacks: Iterable[tuple[int, int]]) -> bool:
        """Whether a version sampled any of it that one of the roll-backs (fence, update) has abandoned."""
        versions = {span.version for span in self.episode.spans}
        return any(v.fence < fence and v.step > step for fence, step in rollbacks for v in versions)

    def is_scored_by(self, promoted: Mapping[str, str]) -> bool:
        """Whether the promoted version of each scorer has scored it."""
        return all(self.scorers.get(name) == version for name, version in promoted.items())


class Groups:
    """Tells which rollouts have the rest of their group beside them. Where groups have one member, all have."""

    def __init__(self, size: int, timeout_s: float, clock: Callable[[], float]) -> None:
        """`size` responses share a prompt; a group that has not all of them `timeout_s` after the first is given up.

        Not before the stream has been read to its end since (`read_to_end`): while the learner trains or pauses it reads
        nothing, and the rest of the group may stand in the stream.
        """
        self._size, self._timeout_s, self._clock = size, timeout_s, clock
        self._since: dict[str, float] = {}
        """When the first member of a group was seen that is not whole."""
        self._read_to_end = -math.inf
        self._refused: dict[str, None] = {}

    def refuse(self, group_id: str) -> None:
        """A member of the group can never train: the others leave as they come."""
        self._refused[group_id] = None
        if len(self._refused) > _REFUSED_KEPT:
            del self._refused[next(iter(self._refused))]

    def read_to_end(self, at: float) -> None:
        """All that stood in the stream at this time, by the clock, has been read."""
        self._read_to_end = max(self._read_to_end, at)

    def whole(self, waiting: Sequence[Held]) -> list[list[Held]]:
        """The groups that are whole, in the order in which they became so.

        That is the stream's, however much of it is in hand: a learner that resumes makes the same batches again.
        """
        groups: dict[str, list[Held]] = {}
        whole: list[list[Held]] = []
        for held in waiting:
            members = groups.setdefault(self._name(held), [])
            members.append(held)
            if len(members) == self._size:
                whole.append(members)
        return whole

    def torn(self, waiting: Sequence[Held], out: Mapping[str, Sequence[Held]]) -> dict[str, list[Held]]:
        """What must leave because others do, by reason: the rest of a torn group, and groups that are given up.

        Args:
            waiting: What would stay.
            out: What leaves, by reason.
        """
        if self._size == 1:
            return {}
        reasons = dict.fromkeys(self._refused, "incomplete_group")
        reasons |= {self._name(held): reason for reason, gone in out.items() for held in gone}
        counts = Counter(self._name(held) for held in waiting)
        partial = {name for name, count in counts.items() if count < self._size}
        now = self._clock()
        self._since = {name: self._since.get(name, now) for name in partial}
        late = {name for name, since in self._since.items() if self._read_to_end - since > self._timeout_s}
        reasons |= dict.fromkeys(late, "incomplete_group")
        torn: dict[str, list[Held]] = {}
        for held in waiting:
            if reason := reasons.get(self._name(held)):
                torn.setdefault(reason, []).append(held)
        return torn

    def _name(self, held: Held) -> str:
        return held.episode.group_id if self._size > 1 else held.rollout_id
