"""Writes `report.json` and `report.html` of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from honed.v1 import learner_pb2

SHOWN_SAMPLES = 32


@dataclass(frozen=True)
class SampleRow:
    """One held-out prompt, continued with the same seed before and after training."""

    prompt: str
    before: str
    after: str
    reward_before: float | None = None
    reward_after: float | None = None


@dataclass(frozen=True)
class RunReport:
    """What a run changed. A figure that is unknown is null in the JSON file.

    Attributes:
        run: its name.
        outcome: `finished`, `stopped` or `failed`.
        error: why it failed.
        updates: the learner's last update.
        phase_seconds: how long each phase took.
        judgements_imported: lines that the run file's judgements have.
        agreement: share of held-out comparisons that the reward orders as people did.
        agreement_pairs: how many there are.
        agreement_by_scorer: the same by each scorer alone.
        reward_before: mean reward of the held-out prompts' continuations by the base policy.
        reward_after: by the trained policy.
        tokens_before: mean length of those continuations.
        tokens_after: of these.
        distinct2_ratio: different word pairs after, as a share of those before.
        best_of: each continuation after training is the best of so many; None if it is the only one.
        kl: nats a response from the base policy: of the last update; without updates, what best-of-n alone costs.
        versions_pushed: versions that generators committed.
        push_pause_p95_ms: 95th percentile of how long requests stood still.
        accounts: where every admitted rollout is.
        alarms: what needs a person.
        samples: held-out prompts with their continuations.
    """

    run: str
    outcome: str
    error: str = ""
    updates: int = 0
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    judgements_imported: int = 0
    agreement: float | None = None
    agreement_pairs: int = 0
    agreement_by_scorer: Mapping[str, float] = field(default_factory=dict)
    reward_before: float | None = None
    reward_after: float | None = None
    tokens_before: float | None = None
    tokens_after: float | None = None
    distinct2_ratio: float | None = None
    best_of: int | None = None
    kl: float | None = None
    versions_pushed: int = 0
    push_pause_p95_ms: float | None = None
    accounts: Mapping[str, int] = field(default_factory=dict)
    alarms: Sequence[str] = ()
    samples: Sequence[SampleRow] = ()

    def as_json(self) -> dict[str, Any]:
        """The figures by name; numbers that are not finite become null."""
        return {name: _finite(value) for name, value in asdict(self).items()}


def write_report(
    json_path: Path,
    html_path: Path,
    report: RunReport,
    updates: Sequence[learner_pb2.StepMetrics],
    pauses: Sequence[float],
) -> None:
    """Writes both files, each whole. The page needs matplotlib and jinja2; without them there is the JSON file alone.

    Args:
        json_path: for programs.
        html_path: for people; it needs nothing beside it.
        report: the figures.
        updates: metrics of each update that is known.
        pauses: of each push, in milliseconds.

    Raises:
        OSError: a file cannot be written.
    """
    _write(json_path, json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n")
    try:
        from honed.report.curves import bars, drawn
        from honed.report.template import render
    except ImportError:
        return
    curves = [(curve.title, picture) for curve, picture in drawn(updates)]
    if pauses:
        curves.append(("Pause of each push", bars(pauses, "ms", "push")))
    samples = report.samples[:SHOWN_SAMPLES]
    _write(html_path, render("honed.report", "run.html", report=report, curves=curves, samples=samples))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
