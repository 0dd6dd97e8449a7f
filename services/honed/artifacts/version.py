"""The name of a policy version: which learner made it (fence) and after how many optimizer steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from honed.kit.errors import InvalidArgument

_LABEL = re.compile(r"(0|[1-9][0-9]{0,18})\.(0|[1-9][0-9]{0,18})")


@dataclass(frozen=True, slots=True, order=True)
class VersionId:
    """One version of the policy, ordered by (fence, step).

    Attributes:
        fence: Rises by one each time a learner takes over the run.
        step: Optimizer steps behind the weights; 0 is the base policy.
    """

    fence: int
    step: int

    def __post_init__(self) -> None:
        """Refuses negative numbers."""
        if self.fence < 0 or self.step < 0:
            raise InvalidArgument("version", f"fence and step count from 0, got fence={self.fence}, step={self.step}")

    @property
    def label(self) -> str:
        """`fence.step`, the form that directories, engines and people use."""
        return f"{self.fence}.{self.step}"

    def __str__(self) -> str:
        return self.label

    @classmethod
    def parse(cls, label: str) -> Self:
        """Reads a label.

        Raises:
            InvalidArgument: If `label` is not two canonical decimal numbers joined by a dot.
        """
        match = _LABEL.fullmatch(label)
        if match is None:
            raise InvalidArgument("version", f"{label!r} is not of the form fence.step, for example 1.42")
        return cls(int(match[1]), int(match[2]))
