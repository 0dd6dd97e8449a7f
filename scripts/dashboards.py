"""Writes the Grafana dashboards of deploy/components/monitoring, or checks that they are fresh.

Examples:
    python scripts/dashboards.py write
    python scripts/dashboards.py check
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "components" / "monitoring" / "dashboards"
NAMESPACE = 'namespace=~"$namespace"'
WIDTH, HEIGHT, COLUMNS = 8, 7, 3
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """One graph.

    Attributes:
        title: what it shows.
        queries: pairs of an expression and the legend of its lines. `$N` stands for the chosen namespace.
        unit: of Grafana.
        about: what to read out of it.
        floor: the axis begins at 0; unset for figures that may be negative.
    """

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    about: str = ""
    floor: bool = True

    def expressions(self) -> Iterator[str]:
        """The queries, with the namespace."""
        return (expression.replace("$N", NAMESPACE) for expression, _ in self.queries)


@dataclass(frozen=True)
class Dashboard:
    """A page of graphs."""

    uid: str
    title: str
    panels: Sequence[Panel] = field(default_factory=tuple)

    def tree(self) -> dict[str, Any]:
        """What Grafana imports."""
        return {
            "uid": self.uid,
            "title": self.title,
            "tags": ["honed"],
            "schemaVersion": 39,
            "editable": False,
            "refresh": "30s",
            "time": {"from": "now-3h", "to": "now"},
            "templating": {
                "list": [
                    {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                    {
                        "name": "namespace",
                        "type": "query",
                        "datasource": DATASOURCE,
                        "query": "label_values(honed_grpc_calls_total, namespace)",
                        "refresh": 2,
                        "includeAll": True,
                        "multi": True,
                    },
                ]
            },
            "panels": [self._panel(number, panel) for number, panel in enumerate(self.panels)],
        }

    def _panel(self, number: int, panel: Panel) -> dict[str, Any]:
        legends = (legend for _, legend in panel.queries)
        return {
            "id": number + 1,
            "type": "timeseries",
            "title": panel.title,
            "description": panel.about,
            "datasource": DATASOURCE,
            "gridPos": {"x": WIDTH * (number % COLUMNS), "y": HEIGHT * (number // COLUMNS), "w": WIDTH, "h": HEIGHT},
            "fieldConfig": {"defaults": {"unit": panel.unit, **({"min": 0} if panel.floor else {})}, "overrides": []},
            "targets": [
                {"refId": chr(ord("A") + place), "datasource": DATASOURCE, "expr": expression, "legendFormat": legend}
                for place, (expression, legend) in enumerate(zip(panel.expressions(), legends, strict=True))
            ],
        }


GENERATE = 'method="/honed.v1.GenerationService/Generate"'

SERVING = Dashboard(
    "honed-serving",
    "honed: serving",
    (
        Panel("Calls", [("sum by (component) (honed:calls:rate5m{$N})", "{{component}}")], "reqps"),
        Panel(
            "Calls that failed through no fault of the caller",
            [("honed:calls_failed:ratio5m{$N}", "{{component}}")],
            "percentunit",
            "Above 1 % the alert HonedCallsFail.",
        ),
        Panel("Calls refused for lack of room", [("honed:calls_refused:ratio5m{$N}", "{{component}}")], "percentunit"),
        Panel(
            "Generate: time to the answer",
            [
                (f"histogram_quantile({q}, sum by (le) (rate(honed_grpc_call_seconds_bucket{{{GENERATE}, $N}}[5m])))", f"p{p}")
                for q, p in ((0.5, 50), (0.95, 95), (0.99, 99))
            ],
            "s",
        ),
        Panel(
            "Samples in the engines and before them",
            [("honed:samples_in_flight:sum{$N}", "{{kind}}")],
            about="Above replicas times generation.max_num_seqs samples wait for their turn.",
        ),
        Panel("Calls being served", [("sum by (component) (honed_grpc_calls_in_flight{$N})", "{{component}}")]),
        Panel(
            "Replicas that answer",
            [('sum by (component) (up{$N, component=~"generation|reward|preference"})', "{{component}}")],
        ),
        Panel("Scored", [("sum (rate(honed_reward_tokens_total{$N}[5m]))", "tokens a second")]),
        Panel(
            "Items that wait to be scored",
            [("sum (honed_reward_queued_items{$N})", "items"), ("honed:reward_wait_seconds:p95_5m{$N}", "p95 of the wait, s")],
        ),
    ),
)

TRAINING = Dashboard(
    "honed-training",
    "honed: training",
    (
        Panel("Phase", [("max by (phase) (honed_run_phase{$N}) == 1", "{{phase}}")]),
        Panel("What needs a person", [("max (honed_run_alarms{$N})", "alarms")], about="`honed --cluster status` says what."),
        Panel(
            "Versions",
            [("max (honed_run_versions_pushed{$N})", "pushed"), ("max (honed_run_versions_refused{$N})", "refused")],
        ),
        Panel(
            "Updates an hour",
            [("max (max_over_time(honed_run_updates{$N}[1h]) - min_over_time(honed_run_updates{$N}[1h]))", "updates")],
        ),
        Panel(
            "Rollouts a second",
            [
                ("max (deriv(honed_run_rollouts_trained{$N}[10m]))", "trained"),
                ("max (deriv(honed_run_rollouts_dropped{$N}[10m]))", "dropped"),
                ('sum (honed:rollouts_scored:rate5m{$N, outcome="handed_on"})', "scored"),
            ],
        ),
        Panel(
            "Streams",
            [("sum by (stage, place) (honed_run_stream_entries{$N})", "{{stage}} {{place}}")],
            about="Where entries stand says who is slow: prompts the generators, rollouts the scorers, scored the learner.",
        ),
        Panel(
            "Workers at work",
            [
                ("sum (honed_generation_training_works{$N})", "generators that take prompts"),
                ("sum (honed_reward_working{$N})", "scorers that take rollouts"),
            ],
        ),
        Panel("Room for training", [("sum (honed_generation_training_room{$N})", "samples")]),
        Panel("Batches skipped", [("max (honed_run_batches_skipped{$N})", "batches")]),
        Panel(
            "Score and reward of an update",
            [(f'max (honed_learner_update{{$N, figure="{name}"}})', name) for name in ("score_mean", "reward_mean")],
            about="The score as it came; the reward is normalised and has the price of KL in it.",
            floor=False,
        ),
        Panel(
            "Distance from the reference",
            [('max (honed_learner_update{$N, figure="kl"})', "nats a response")],
            about="Rising without a bound: raise the KL coefficient, or lower the learning rate.",
            floor=False,
        ),
        Panel("Entropy", [('max (honed_learner_update{$N, figure="entropy"})', "nats a token")]),
        Panel(
            "Staleness",
            [(f'max (honed_learner_update{{$N, figure="{name}"}})', name) for name in ("staleness_max", "staleness_mean")],
        ),
        Panel(
            "Learner and sampler on the same weights",
            [('max (honed_learner_update{$N, figure="sampler_gap_same_weights"})', "mean exp gap")],
            about="1 is agreement; above 1.05 one of the two computes something else.",
        ),
        Panel(
            "Pause of a push",
            [
                (f"histogram_quantile({q}, sum by (le) (rate(honed_learner_push_pause_seconds_bucket{{$N}}[30m])))", f"p{p}")
                for q, p in ((0.5, 50), (0.95, 95))
            ],
            "s",
            "How long requests in flight stand still while a generator changes its weights.",
        ),
    ),
)

DASHBOARDS = (SERVING, TRAINING)


def main() -> int:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "check"))
    what = parser.parse_args().what
    stale = []
    for dashboard in DASHBOARDS:
        file, text = FOLDER / f"{dashboard.uid}.json", json.dumps(dashboard.tree(), indent=1) + "\n"
        if what == "write":
            FOLDER.mkdir(exist_ok=True)
            file.write_text(text)
        elif not file.exists() or file.read_text() != text:
            stale.append(file.name)
    if stale:
        print(f"not fresh: {', '.join(stale)}; run python scripts/dashboards.py write", file=sys.stderr)
    return min(len(stale), 1)


if __name__ == "__main__":
    sys.exit(main())
