"""What a recipe made of the policy, as `recipe.json` says it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class RecipeFigures:
    """The figures of one run.

    Attributes:
        recipe: Its name.
        seed: Of the run.
        figure: What `before` and `after` are, of continuations of held-out prompts.
        before: Of the base policy.
        after: Of the trained one.
        others: Further figures by name, each before and after.
        kl_nats: Of the trained policy's continuations to the base policy, nats a response (k1).
        distinct2_ratio: Distinct word pairs after, as a share of those before; None where responses are no running text.
        updates: Of the learner.
        examples: Episodes, or pairs, that were trained on.
        versions_pushed: Into the running generator.
        seconds: From the data to the last measure.
        seconds_training: Of the loop alone.
        reused: What was taken from `reuse` and not trained again, each with the seconds that it once took.
        curves: Of the learner's metrics by name, the value of each update that has one.
    """

    recipe: str
    seed: int
    figure: str
    before: float
    after: float
    others: Mapping[str, Sequence[float]]
    kl_nats: float
    distinct2_ratio: float | None
    updates: int
    examples: int
    versions_pushed: int
    seconds: float
    seconds_training: float
    reused: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """Reads what `as_json` gave.

        Raises:
            TypeError: It has other keys.
        """
        return cls(**tree)

    def write(self, path: Path) -> None:
        """Writes the file whole.

        Raises:
            OSError: It cannot be written.
            ValueError: A figure is not finite.
        """
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)

    def rows(self) -> list[tuple[str, str]]:
        """Each figure with its value in words, for people."""
        shown = {name: value for name, value in self.as_json().items() if name not in ("others", "curves", "reused")}
        rows = [(name, f"{value:.3f}" if isinstance(value, float) else str(value)) for name, value in shown.items()]
        rows += [(name, f"{before:.3f} → {after:.3f}") for name, (before, after) in self.others.items()]
        rows += [(f"reused: {name}", f"took {seconds:.0f} s once") for name, seconds in self.reused.items()]
        return [(name, value) for name, value in rows if value != "None"]
