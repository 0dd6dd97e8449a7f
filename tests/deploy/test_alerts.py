"""Rules and alerts speak of metrics that are exported, and every alert has its page."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import REGISTRY
from scripts.dashboards import DASHBOARDS, Panel
from tests.deploy.manifests import DEPLOY, named, of_kind, overlay
from tests.deploy.promql import Samples, evaluate

import honed.conductor.metrics
import honed.generation.metrics
import honed.kit.metrics
import honed.learner.metrics
import honed.reward.metrics
from honed.kit.log import JsonFormatter

OTHERS = {
    "up", "kube_pod_container_status_restarts_total", "kube_pod_status_ready", "kube_cronjob_status_last_successful_time",
    "kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes",
    "certmanager_certificate_expiration_timestamp_seconds", "kube_cronjob_created", "kube_deployment_spec_replicas",
    "kube_statefulset_replicas",
}  # fmt: skip
"""Of Prometheus itself, kube-state-metrics, the kubelet and cert-manager."""
MODULES = (
    honed.conductor.metrics,
    honed.generation.metrics,
    honed.kit.metrics,
    honed.learner.metrics,
    honed.reward.metrics,
)


def rules() -> list[dict[str, Any]]:
    return [
        rule
        for tree in of_kind(overlay("production"), "PrometheusRule")
        for group in tree["spec"]["groups"]
        for rule in group["rules"]
    ]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def exported() -> dict[str, set[str]]:
    """Every series of the services, with its labels."""
    found: dict[str, set[str]] = {}
    for module in MODULES:
        for metric in vars(module).values():
            if not hasattr(metric, "_labelnames"):
                continue
            name, labels = metric._name, set(metric._labelnames)
            match metric._type:
                case "counter":
                    found[f"{name}_total"] = labels
                case "histogram":
                    found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
                case "gauge":
                    found[name] = labels
    return found


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The series that an expression reads, each with the labels that it asks for."""
    pending = [promql_parser.parse(expression)]
    while pending:
        node = pending.pop()
        if isinstance(node, promql_parser.VectorSelector):
            yield node.name, {matcher.name for matcher in node.matchers.matchers}
            continue
        parts = [getattr(node, name, None) for name in ("lhs", "rhs", "expr", "param", "vector_selector", "vs")]
        parts += list(getattr(node, "args", None) or [])
        pending += [part for part in parts if isinstance(part, promql_parser.Expr)]


def test_the_exported_names_are_what_a_scrape_shows() -> None:
    names = {sample.name for family in REGISTRY.collect() for sample in family.samples}
    plain = {name for name, labels in exported().items() if not labels - {"le"}}
    assert plain <= names


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_reads_what_is_there(rule: dict[str, Any]) -> None:
    check_series(rule["expr"])


def check_series(expression: str) -> None:
    """Every series that an expression reads is exported or recorded, with the labels that it asks for."""
    recorded, series = {row["record"] for row in rules() if "record" in row}, exported()
    read = list(selectors(expression))
    assert read
    for name, labels in read:
        assert name in recorded | OTHERS | set(series), name
        if name in series:
            assert labels <= series[name] | {"namespace", "pod", "component"}, (name, labels)


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_has_a_page_that_says_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"warning", "critical"}
    assert alert["annotations"]["runbook"] == f"deploy/runbooks/{alert['alert']}.md"
    page = (DEPLOY / "runbooks" / f"{alert['alert']}.md").read_text()
    assert page.startswith(f"# {alert['alert']}\n")
    assert "## What it means" in page
    assert "## What to do" in page
    assert f"runbooks/{alert['alert']}.md" in (DEPLOY / "README.md").read_text()


ONLINE = {'honed_run_phase{phase="online", namespace="run"}': 1.0}
STOPPED = {'kube_statefulset_replicas{statefulset="honed-learner", namespace="run"}': 0.0}
WANTED = dict.fromkeys(STOPPED, 1.0)
NO_REWARD = {'kube_deployment_spec_replicas{deployment="honed-reward", namespace="run"}': 0.0}
STANDS = {'honed_run_versions_pushed{namespace="run"}': 0.0, 'up{component="learner", namespace="elsewhere"}': 1.0}


def raised(samples: Samples, *names: str, now: float = 0.0) -> set[str]:
    """Those of the alerts that some series raise in the namespace `run`."""
    by_name = {alert["alert"]: alert["expr"] for alert in alerts()}
    found = {name: evaluate(by_name[name], samples, now) for name in names}
    return {name for name, vector in found.items() if any(("namespace", "run") in labels for labels in vector)}


def test_stopped_training_raises_no_alert_and_training_that_stands_does() -> None:
    about = ("HonedLearnerDown", "HonedNoNewVersion", "HonedRewardDown")
    assert raised({**ONLINE, **STANDS}, *about) == set(about)  # without kube-state-metrics too
    assert raised({**ONLINE, **STANDS, **WANTED}, *about) == set(about)
    assert raised({**ONLINE, **STANDS, **WANTED, **NO_REWARD}, *about) == set(about)
    assert raised({**ONLINE, **STANDS, **STOPPED}, *about) == {"HonedRewardDown"}
    assert raised({**ONLINE, **STANDS, **STOPPED, **NO_REWARD}, *about) == set()
    up = {f'up{{component="{name}", namespace="run", pod="a"}}': 1.0 for name in ("learner", "reward")}
    assert raised({**ONLINE, **STANDS, **WANTED, **up}, *about) == {"HonedNoNewVersion"}


@pytest.mark.parametrize(
    ("alarms", "scaled", "expected"),
    [
        (0, {}, False), (1, {}, True), (1, WANTED, True), (1, STOPPED, False), (2, STOPPED, True),
        (2, {**STOPPED, **NO_REWARD}, False), (3, {**STOPPED, **NO_REWARD}, True),
    ],
)  # fmt: skip
def test_an_alarm_about_what_is_scaled_to_zero_calls_nobody(alarms: int, scaled: Samples, expected: bool) -> None:
    samples = {'honed_run_alarms{namespace="run", pod="a"}': float(alarms), **scaled}
    assert bool(raised(samples, "HonedRunNeedsAPerson")) is expected


def test_a_reward_service_that_waits_for_its_model_does_not_stand() -> None:
    idle = {'honed_reward_working{namespace="run", pod="a"}': 0.0}
    before = {
        'honed_run_phase{phase="online", namespace="run"}': 0.0,
        'honed_run_phase{phase="reward-model", namespace="run"}': 1.0,
    }
    assert not raised({**idle, **before}, "HonedScoringStands")
    assert raised({**idle, **ONLINE}, "HonedScoringStands")


def test_a_backup_that_never_succeeded_is_late_too() -> None:
    labels = '{cronjob="honed-backup-store", namespace="run"}'
    created, succeeded = f"kube_cronjob_created{labels}", f"kube_cronjob_status_last_successful_time{labels}"
    late = 130_000.0
    assert not raised({created: 0.0}, "HonedBackupLate", now=100_000.0)
    assert raised({created: 0.0}, "HonedBackupLate", now=late)
    assert not raised({created: 0.0, succeeded: 90_000.0}, "HonedBackupLate", now=late)
    assert raised({created: 0.0, succeeded: 90_000.0}, "HonedBackupLate", now=90_000.0 + late)


@pytest.mark.parametrize("page", sorted((DEPLOY / "runbooks").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_looks_for_levels_as_logs_write_them(page: Path) -> None:
    record = logging.LogRecord("honed", logging.ERROR, "", 0, "text", None, None)
    written = json.loads(JsonFormatter("reward").format(record))["level"]
    for level in re.findall(r'"level": "(\w+)"', page.read_text()):
        assert level == level.lower(), level
        assert written == "error"


@pytest.mark.parametrize("panel", [p for d in DASHBOARDS for p in d.panels], ids=lambda panel: panel.title)
def test_a_panel_reads_what_is_there(panel: Panel) -> None:
    for expression in panel.expressions():
        check_series(expression)


def test_the_dashboards_are_fresh_and_in_the_overlay() -> None:
    made = {f"{dashboard.uid}.json": dashboard.tree() for dashboard in DASHBOARDS}
    config = named(overlay("production"), "ConfigMap", "honed-dashboards")
    assert {name: json.loads(text) for name, text in config["data"].items()} == made
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_there_is_no_page_without_its_alert() -> None:
    assert {page.stem for page in (DEPLOY / "runbooks").glob("*.md")} == {alert["alert"] for alert in alerts()}


def adapter_rules() -> list[dict[str, Any]]:
    adapted = yaml.safe_load((DEPLOY / "components" / "hpa" / "adapter-rules.yaml").read_text())
    return [{"kind": kind, **rule} for kind, key in (("Pods", "rules"), ("External", "externalRules")) for rule in adapted[key]]


def test_the_adapter_has_a_rule_for_each_metric_of_the_autoscalers() -> None:
    scalers = list(yaml.safe_load_all((DEPLOY / "components" / "hpa" / "scaling.yaml").read_text()))
    metrics = [metric for tree in scalers for metric in tree["spec"]["metrics"]]
    asked = {(metric["type"], metric[metric["type"].lower()]["metric"]["name"]) for metric in metrics}
    assert asked == {(rule["kind"], rule["name"]["as"]) for rule in adapter_rules()}
    assert {rule["seriesQuery"].partition("{")[0] for rule in adapter_rules()} <= set(exported())


@pytest.mark.parametrize("rule", adapter_rules(), ids=lambda rule: rule["name"]["as"])
def test_a_metric_of_the_autoscalers_has_a_value_when_nothing_happens(rule: dict[str, Any]) -> None:
    """A query that leaves a value out, as a comparison does, keeps an autoscaler from taking replicas away."""
    query = rule["metricsQuery"].replace("<<.Series>>", rule["seriesQuery"].partition("{")[0])
    query = query.replace("<<.LabelMatchers>>", 'namespace="honed"').replace("<<.GroupBy>>", "namespace, pod")
    check_series(query)
    assert not re.search(r"[<>]|==|!=", query)


def test_every_serving_pod_is_scraped() -> None:
    [endpoint] = named(overlay("production"), "PodMonitor", "honed")["spec"]["podMetricsEndpoints"]
    for tree in of_kind(overlay("production"), "Deployment", "StatefulSet"):
        ports = [p["name"] for c in tree["spec"]["template"]["spec"]["containers"] for p in c["ports"]]
        component = tree["metadata"]["labels"]["app.kubernetes.io/component"]
        assert (endpoint["port"] in ports) is (component not in {"redis", "postgres", "minio"})


def test_every_series_is_documented() -> None:
    text = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    names = {name for name in exported() if not name.endswith(("_bucket", "_sum", "_count"))}
    names |= {name.removesuffix("_bucket") for name in exported() if name.endswith("_bucket")}
    documented = set(re.findall(r"`(honed_\w+)`", text))
    assert names == documented


def test_no_alert_takes_a_difference_that_one_missing_number_spoils() -> None:
    """`delta`, `deriv` and `rate` of a gauge are NaN as long as one sample of the window is."""
    assert not [alert["alert"] for alert in alerts() if "delta(honed_run" in alert["expr"]]
