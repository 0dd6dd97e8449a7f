"""Checks the weights of those who judged against who did."""

from __future__ import annotations

from honed.check.findings import Report
from honed.learner.settings import RewardTrainingSettings
from honed.v1 import preference_pb2


class WeightCheck:
    """The judgements of a run's files, by who judged."""

    def __init__(self, section: RewardTrainingSettings) -> None:
        """Has seen none yet."""
        self._section = section
        self._annotators: set[str] = set()
        self._sources: set[str] = set()
        self._counts = False

    def add(self, judgement: preference_pb2.Judgement) -> None:
        """Takes note of one."""
        self._annotators.add(judgement.annotator)
        self._sources.add(judgement.source)
        self._counts = self._counts or self._section.weight(judgement.annotator, judgement.source) > 0

    def tell(self, report: Report, *, whole: bool) -> None:
        """Adds what was found; `whole` says that all judgements were seen. Nothing was if there are none."""
        section = self._section
        if self._annotators and whole and not self._counts:
            report.error(
                "reward_training.annotator_weights",
                "with source_weights, leave no judgement of data.judgements: give somebody who judged a weight above 0",
            )
        named = {"annotator_weights": self._annotators, "source_weights": self._sources}
        for field, seen in named.items():
            unknown = sorted(getattr(section, field).keys() - seen)
            if self._annotators and whole and unknown:
                report.warning(
                    f"reward_training.{field}", f"{', '.join(unknown)}: nothing in data.judgements is of that name; misspelt?"
                )
