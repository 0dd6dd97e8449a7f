"""Where every admitted rollout is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from honed.queue.admission import Cursor
from honed.queue.keys import PROMPTS, STAGES
from honed.queue.progress import LearnerProgress
from honed.queue.stats import DROPPED, StageStats

_DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Accounts:
    """Rollouts by where they are.

    At any instant

        admitted = trained + undone + in_flight + sum(dropped) + sum(dead) + lost_with_redis

    A second copy of a rollout, which Redis brought back after the learner had seen the first, is no rollout: those that the
    learner dropped are counted by themselves.

    Attributes:
        admitted: Started: turns times samples.
        trained: Behind the learner's weights.
        undone: Trained on in updates that a rollback or a damaged checkpoint undid.
        in_flight: On their way.
        dropped: Left for a reason, by reason.
        dead: Given up and not replayed, by stage; those that somebody deleted too.
        lost_with_redis: What Redis lost: nobody knows more. 0 unless it lost something.
        duplicates: Second copies that were dropped.
    """

    admitted: int = 0
    trained: int = 0
    undone: int = 0
    in_flight: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    dead: Mapping[str, int] = field(default_factory=dict)
    lost_with_redis: int = 0
    duplicates: int = 0

    def by_name(self) -> dict[str, int]:
        """As `Run.accounts` of the contract; all but `admitted` add up to it."""
        return {
            "admitted": self.admitted,
            "trained": self.trained,
            "undone": self.undone,
            "in_flight": self.in_flight,
            "lost_with_redis": self.lost_with_redis,
            **{f"dropped:{reason}": count for reason, count in self.dropped.items()},
            **{f"dead:{stage}": count for stage, count in self.dead.items()},
        }


def read_accounts(
    stages: Mapping[str, StageStats],
    progress: LearnerProgress | None,
    cursor: Cursor,
    totals: Mapping[str, int],
    *,
    samples: int,
    batch: int,
) -> Accounts:
    """The accounts at one instant.

    Without a loss, Redis itself knows where each admitted rollout is, acknowledged ones included: what is missing there is
    lost with it. But the learner may have trained on some of these, and knows it: they are not lost.

    Args:
        stages: The counts of each stage.
        progress: What the learner said last; its `unsaved` rollouts stand in stream `scored`.
        cursor: How far the prompts have come.
        totals: `RunCounters.totals` after `stages`.
        samples: Rollouts of a prompt.
        batch: Rollouts of an update.
    """
    trained = progress.update * batch if progress else 0
    undone, unsaved = (progress.undone, progress.unsaved) if progress else (0, 0)
    admitted = (cursor.position - cursor.skipped) * samples
    dropped: dict[str, int] = {}
    dead: dict[str, int] = {}
    acked = duplicates = 0
    for name, count in totals.items():
        stage, _, what = name.partition("/")
        rollouts = count * (samples if stage == PROMPTS else 1)
        if what == "acked":
            acked += rollouts
        elif what == "dead":
            dead[stage] = rollouts
        elif what == DROPPED + _DUPLICATE:
            duplicates += rollouts
        elif what.startswith(DROPPED):
            reason = what.removeprefix(DROPPED)
            dropped[reason] = dropped.get(reason, 0) + rollouts
    depth = sum(stats.depth * (samples if stage == PROMPTS else 1) for stage, stats in stages.items())
    left = sum(dropped.values()) + sum(dead.values())
    # A conductor that starts after Redis lost the cursor does not know of all that its predecessor admitted.
    admitted = max(admitted, trained + undone + left)
    missing = admitted - acked - left - depth
    # Between the learner's word that nothing is unsaved and its acknowledgement, these exceed `acked` for a moment too.
    trained_unknown_to_redis = trained + undone - acked - unsaved
    elsewhere = admitted - trained - undone - left
    lost = max(0, min(missing - trained_unknown_to_redis, elsewhere))
    return Accounts(
        admitted,
        trained,
        undone,
        elsewhere - lost,
        dict(sorted(dropped.items())),
        {stage: count for stage, count in dead.items() if count},
        lost,
        duplicates,
    )


class RunCounters:
    """Counts of how entries left their stages, over a Redis that lost everything.

    A Redis that lost only its last seconds is left alone: streams and counts went back together, and what comes again is
    counted again. One that is empty begins to count at 0, so what it had counted is carried on. This knows what it has seen,
    at most a moment less than what was there.
    """

    def __init__(self, carried: Mapping[str, int] | None = None) -> None:
        """Starts from `carried`: what a predecessor carried on (`Cursor.carried`)."""
        self.carried: dict[str, int] = dict(carried or {})
        self._last: dict[str, int] = {}
        self._came_in = 0

    def observe(self, stages: Mapping[str, StageStats]) -> bool:
        """Takes one look; returns whether Redis has been emptied since the last."""
        came_in = stages[PROMPTS].came_in
        emptied = came_in == 0 < self._came_in
        if emptied:
            self.carried = self.totals
        self._came_in, self._last = came_in, _counts(stages)
        return emptied

    @property
    def totals(self) -> dict[str, int]:
        """Counts by `<stage>/acked`, `<stage>/dead` and `<stage>/dropped:<reason>`."""
        names = {*self.carried, *self._last}
        return {name: self.carried.get(name, 0) + self._last.get(name, 0) for name in sorted(names)}


def _counts(stages: Mapping[str, StageStats]) -> dict[str, int]:
    found: dict[str, int] = {}
    for stage in STAGES:
        stats = stages[stage]
        found[f"{stage}/acked"] = stats.acked
        found[f"{stage}/dead"] = stats.buried - stats.replayed
        found.update({f"{stage}/{DROPPED}{reason}": count for reason, count in stats.dropped.items()})
    return {name: count for name, count in found.items() if count}
