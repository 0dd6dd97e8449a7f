"""How far ahead of the learner rollouts start: as little as keeps the learner from waiting.

With a lead of 1 the rollouts of the next update are sampled while the update under way runs, by the version served at its
start: they are one update old when they train, and if the generators make a batch within the time of an update the learner
never waits. A lead above 1 starts some of them an update earlier. It is needed when a version is brought in while the learner
trains on, which leaves less than an update to sample in, and when the last rollouts of a batch take long.
"""

from __future__ import annotations

from typing import Final

from honed.queue.progress import LearnerProgress

_TOLERATED: Final = 0.01  # share of the time between two updates that the learner may wait
_MOST_A_STEP: Final = 0.25
_LEAK: Final = 0.01  # an unneeded lead goes back by itself
_SPARE_GAIN: Final = 0.5
_SPARE_TOLERATED: Final = 8  # 1 / 8 of a batch
_LOW: Final = 4  # generators run dry when every prompt is taken and less than 1 / 4 of a batch is on its way


class FreshnessController:
    """Sets the lead from what the learner reports and from when the generators ran dry. Pure: the clock is the caller's.

    - Raise it if the learner waited for its batch and the generators had run dry meanwhile: an earlier start would have helped.
      A learner that waits for generators that are busy all the time gains nothing from a lead, it only gets older rollouts.
    - Lower it by what stood finished beside the batch when the learner took it: that was started too early.

    Attributes:
        lead: Updates; between min(1, max_staleness) and max_staleness.
    """

    def __init__(self, batch: int, max_staleness: int) -> None:
        self._batch, self._most = batch, float(max_staleness)
        self._least = self.lead = min(1.0, self._most)
        self._fence = self._update = -1
        self._measured = False
        self._since = self._last = 0.0
        self._dry_s = self._dry_before_s = 0.0

    def observe(self, now: float, progress: LearnerProgress, running: int, untaken: int) -> float:
        """Takes one look at the loop, many times an update; returns the lead.

        Args:
            now: Seconds, monotonic.
            progress: What the learner reports.
            running: Rollouts that are admitted and not yet scored.
            untaken: Prompts among them that no generator has room for yet.
        """
        if (progress.fence, progress.update) < (self._fence, self._update) or progress.fence != self._fence:
            self._begin(now, progress)
            self._measured, self._dry_before_s = False, 0.0
            return self.lead
        if not untaken and running * _LOW < self._batch:
            self._dry_s += now - self._last
        self._last = now
        if progress.update > self._update:
            if self._measured:
                self._adjust(progress, (now - self._since) / (progress.update - self._update))
            # The wait of an update follows the time in which its predecessor trained: both may have been dry.
            self._measured, self._dry_before_s = True, self._dry_s
            self._begin(now, progress)
        return self.lead

    def _begin(self, now: float, progress: LearnerProgress) -> None:
        self._fence, self._update = progress.fence, progress.update
        self._since = self._last = now
        self._dry_s = 0.0

    def _adjust(self, progress: LearnerProgress, cycle_s: float) -> None:
        change = -_LEAK
        if cycle_s > 0 and progress.waited_s > _TOLERATED * cycle_s:
            helps_s = min(progress.waited_s, self._dry_s + self._dry_before_s)
            change = min(_MOST_A_STEP, helps_s / cycle_s)
        elif progress.spare * _SPARE_TOLERATED > self._batch:
            change = -min(_MOST_A_STEP, _SPARE_GAIN * progress.spare / self._batch)
        self.lead = min(self._most, max(self._least, self.lead + change))
