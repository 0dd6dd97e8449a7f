"""Claims about `honed check --cluster` alone: what one machine alone can honour is refused by its key, with what to write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, SecretStr
from typer.testing import CliRunner

from honed.check.cluster import check_cluster
from honed.check.findings import Report
from honed.cli.main import app
from honed.config import RunSettings
from honed.topology import SERVICES

SERVED = {"host": "0.0.0.0", "port": 50051, "health_port": 8081, "metrics_port": 9090}


def cluster_tree() -> dict[str, Any]:
    """A run file that a cluster can honour."""
    tree: dict[str, Any] = {name: {**SERVED, "address": f"dns:///honed-{name}:50051"} for name in SERVICES}
    tree["conductor"] |= {"launcher": "none", "start_from": "/data/model"}
    tree["generation"]["control_port"] = 50052
    tree["reward"]["scorers"] = [{"name": "people", "kind": "reward_model", "source": "trained"}]
    tree["preference"]["database_url"] = "postgresql://honed@honed-postgres/honed"
    return tree | {
        "directory": "/var/lib/honed",
        "security": {"tokens": "/etc/honed/tokens"},
        "queue": {"url": "redis://honed-redis:6379/0", "password_file": "/etc/honed/redis/password"},
        "policy": {"url": "s3://bucket/honed"},
        "data": {
            "prompts": "/data/prompts.jsonl",
            "demonstrations": ["/data/shown.jsonl"],
            "judgements": [{"file": "/data/pairs.jsonl"}],
            "evaluation": {"prompts": "/data/held.jsonl", "judgements": {"file": "/data/held-pairs.jsonl"}},
        },
    }


def checked(tmp_path: Path, tree: Mapping[str, Any]) -> Report:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(dict(tree)))
    return check_cluster(path)[1]


def changed(key: str, value: Any) -> dict[str, Any]:
    """The run file with one key set to another value; None takes it out."""
    tree = cluster_tree()
    *sections, name = key.split(".")
    section = tree
    for part in sections:
        section = section.setdefault(part, {})
    if value is None:
        del section[name]
    else:
        section[name] = value
    return tree


def test_a_run_file_for_a_cluster_has_no_error(tmp_path: Path) -> None:
    report = checked(tmp_path, cluster_tree())
    assert report.errors == []
    assert [finding.where for finding in report.findings] == ["conductor.launcher"], "without jobs, as it says itself"


REFUSED: list[tuple[str, Any, str, str]] = [
    ("data.prompts", "prompts.jsonl", "data.prompts", "a path of this machine that no Pod has: name a file under /data"),
    ("data.prompts", "/data/../home/me/p.jsonl", "data.prompts", "no Pod has"),
    ("data.demonstrations", ["/data/a.jsonl", "/home/b.jsonl"], "data.demonstrations.1", "is /home/b.jsonl"),
    ("data.texts", ["/data/a.jsonl", "/home/b.jsonl"], "data.texts.1", "is /home/b.jsonl"),
    ("data.judgements", [{"file": "pairs.jsonl"}], "data.judgements.0.file", "name a file under /data"),
    ("data.evaluation.prompts", "held.jsonl", "data.evaluation.prompts", "under /data"),
    ("data.evaluation.judgements.file", "/tmp/x", "data.evaluation.judgements.file", "under /data"),
    ("reward_training.start_from", "models/large", "reward_training.start_from", "name a model directory under /data"),
    ("reuse", "/home/me/shelf", "reuse", "no Pod can write to: leave it out"),
    ("conductor.start_from", "models/base", "conductor.start_from", "name a model directory under /data"),
    ("conductor.launcher", "process", "conductor.launcher", "write kubernetes"),
    ("directory", "out/run", "directory", "the services can write to /var/lib/honed alone"),
    ("security.tokens", "secrets/tokens", "security.tokens", "write /etc/honed/tokens"),
    ("security.tokens", None, "security.tokens", "each Pod would make tokens that no other knows: write /etc/honed/tokens"),
    ("security.tls", {"authority": "/home/ca", "certificate": "/etc/honed/tls/c", "key": "/etc/honed/tls/k"},
     "security.tls.authority", "name a certificate under /etc/honed/tls"),
    ("learner.host", "127.0.0.1", "learner.host", "no probe reaches it: write 0.0.0.0"),
    ("generation.host", "localhost", "generation.host", "write 0.0.0.0"),
    ("reward.port", 0, "reward.port", "each Pod would choose one, and the manifests"),
    ("generation.control_port", 0, "generation.control_port", "write 50052"),
    ("preference.address", None, "preference.address", "write dns:///honed-preference:50051"),
    ("preference.address", "127.0.0.1:50051", "preference.address", "is each Pod itself"),
    ("learner.address", "dns:///localhost:50051", "learner.address", "is each Pod itself"),
    ("generation.control_address", "127.0.0.1:50052", "generation.control_address", "leave it out"),
    ("queue.url", None, "queue.url", "an embedded Redis serves one machine; write redis://honed-redis:6379/0"),
    ("queue.url", "redis://localhost:6379/0", "queue.url", "each Pod would look for in itself"),
    ("queue.password_file", "redis.password", "queue.password_file", "name a password under /etc/honed/redis"),
    ("queue.password", "hunter2", "queue.password", "a run file is a ConfigMap there: take it out"),
    ("queue.url", "redis://:hunter2@redis:6379/0", "queue.url", "holds a password"),
    ("telemetry.headers_file", "headers", "telemetry.headers_file", "under /etc/honed/telemetry/headers"),
    ("tracking.mlflow.uri", "mlruns", "tracking.mlflow.uri", "a path that the conductor's Pod cannot write"),
    ("tracking.mlflow.uri", "sqlite:////home/me/m.db", "tracking.mlflow.uri", "name http://mlflow.mlflow.svc:5000"),
    ("tracking.mlflow.uri", "http://localhost:5000", "tracking.mlflow.uri", "the Pod would look for in itself"),
    ("tracking.mlflow.uri", "https://me:hunter2@mlflow/", "tracking.mlflow.uri", "HONED_TRACKING__MLFLOW__URI from a Secret"),
    ("tracking.tensorboard.directory", "tb", "tracking.tensorboard.directory", "name a directory under /var/lib/honed"),
    ("policy.url", None, "policy.url", "name an object store that every Pod reaches (s3://BUCKET/PATH), or"),
    ("policy.url", "/srv/policy", "policy.url", "each Pod would have a store of its own"),
    ("policy.url", "file:///srv/policy", "policy.url", "a path that no volume is shared at"),
    ("policy.url", "memory://policy", "policy.url", "which no other process sees"),
    ("preference.database_url", "sqlite:////home/me/p.db", "preference.database_url", "write a file under /var/lib/honed"),
    ("preference.database_url", "postgresql://honed@127.0.0.1/h", "preference.database_url", "leads the Pod to itself"),
    ("preference.database_url", "postgresql://honed:hunter2@db/h", "preference.database_url",
     "set HONED_PREFERENCE__DATABASE_URL from a Secret"),
    ("reward.scorers", [{"name": "m", "kind": "reward_model", "source": "models/rm"}], "reward.scorers.0.source",
     "name a model directory, or write trained or artifact:NAME/VERSION under /data"),
    ("reward.scorers", [{"name": "e", "kind": "ensemble", "options": {"members": ["artifact:trained/0.1", "models/rm"]}}],
     "reward.scorers.0.options.members.1", "under /data"),
    ("reward.scorers", [{"name": "r", "kind": "remote", "source": "there:1", "options": {"token_file": "/home/t"}}],
     "reward.scorers.r.options.token_file", "under /etc/honed"),
    ("reward.allowed_roots", ["/home"], "reward.allowed_roots.0", "under /data"),
    ("security.tls", {"authority": "/etc/honed/tls/a", "certificate": "/home/c", "key": "/etc/honed/tls/k"},
     "security.tls.certificate", "name a certificate under /etc/honed/tls"),
    ("security.tls", {"authority": "/etc/honed/tls/a", "certificate": "/etc/honed/tls/c", "key": "k"},
     "security.tls.key", "name a certificate under /etc/honed/tls"),
    ("security.tokens", "/etc/honed/mine", "security.tokens", "write /etc/honed/tokens"),
    ("conductor.kubernetes.namespace", "other", "conductor.kubernetes.namespace", "the rights of its own namespace alone"),
    ("conductor.kubernetes.kubeconfig", "/etc/honed/k", "conductor.kubernetes.kubeconfig", "has its service account"),
    ("conductor.kubernetes.context", "kind", "conductor.kubernetes.context", "has its service account"),
    ("conductor.kubernetes.identity", "me", "conductor.kubernetes.identity", "would both hold the Lease"),
    ("generation.address", "ipv4:10.0.0.1:1,127.0.0.1:1", "generation.address", "is each Pod itself"),
    ("reward.address", "unix:/run/reward.sock", "reward.address", "is each Pod itself"),
    ("conductor.address", "0.0.0.0:50051", "conductor.address", "is each Pod itself"),
    ("conductor.address", "dns:[::1]:50051", "conductor.address", "is each Pod itself"),
    ("conductor.host", "127.0.0.1", "conductor.host", "write 0.0.0.0"),
    ("reward.host", "::1", "reward.host", "write 0.0.0.0"),
    ("preference.host", "127.0.0.2", "preference.host", "write 0.0.0.0"),
    ("telemetry.otlp_endpoint", "http://localhost:4317", "telemetry.otlp_endpoint", "add the component tracing"),
    ("telemetry.otlp_endpoint", "https://[::1]:4317", "telemetry.otlp_endpoint", "which each Pod would look for in itself"),
    ("preference.database_url", "postgresql:///honed", "preference.database_url", "leads the Pod to itself"),
    ("preference.database_url", "postgresql:///h?host=/run/pg", "preference.database_url", "leads the Pod to itself"),
    ("preference.database_password_file", "/home/p", "preference.database_password_file", "under /etc/honed/database"),
]  # fmt: skip
"""Keys with values that a cluster cannot honour, the key that the error names, and its words."""

EXEMPT = {
    "run": "a name",
    "security.tls.server_name": "a name in certificates",
    "reward.scorers.name": "a name",
    "reward.scorers.options": "the function's own",
    "reward.truncate.token_text": "text",
    "learner.algorithm": "found with the run file",
    "learner.options": "the algorithm's numbers",
    "learner.device": "what the Pod's node has; the component gpu gives it",
    "data.made": "refused with the run file where a conductor starts no processes",
    "reward_training.annotator_weights": "names",
    "reward_training.source_weights": "names",
    "sft.device": "what the Pod's node has; the component gpu gives it",
    "reward_training.device": "what the Pod's node has; the component gpu gives it",
    "conductor.application_prompts.redact": "an image may have it, so that it is a warning",
    "tracking.mlflow.experiment": "a name",
    "tracking.wandb.project": "a name",
    "tracking.wandb.entity": "a name",
    "data.judgements.source": "a name",
    "data.judgements.annotator": "a name",
    "data.evaluation.judgements.source": "a name",
    "data.evaluation.judgements.annotator": "a name",
}
"""Keys with free text that leads nowhere, with why."""


def text_keys(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """The keys whose value may be a path, a URL, an address or any other text."""
    for name, field in section.model_fields.items():
        types = list(types_in(field.annotation))
        for inner in types:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from text_keys(inner, f"{before}{name}.")
        if {str, Path, SecretStr} & set(types):
            yield before + name


def types_in(annotation: Any) -> Iterator[Any]:
    yield annotation if get_origin(annotation) is None else None
    for inner in get_args(annotation):
        yield from types_in(inner)


def test_each_key_that_may_lead_somewhere_is_checked_or_has_a_reason() -> None:
    """A key that is new must be refused where it leads to one machine, by a case of `REFUSED`, or be exempt."""
    refused = {re.sub(r"\.\d+", "", where) for _, _, where, _ in REFUSED}
    assert not refused & EXEMPT.keys()
    assert set(text_keys(RunSettings)) <= refused | EXEMPT.keys()
    assert EXEMPT.keys() <= set(text_keys(RunSettings)), "what is exempt is there"


@pytest.mark.parametrize(("key", "value", "where", "words"), REFUSED)
def test_what_a_cluster_cannot_honour_is_refused_by_its_key(
    tmp_path: Path, key: str, value: Any, where: str, words: str
) -> None:
    errors = checked(tmp_path, changed(key, value)).errors
    assert [finding.where for finding in errors] == [where]
    assert words in errors[0].text
    assert "hunter2" not in errors[0].text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("policy.url", "/var/lib/honed/policy", "needs the component store-volume"),
        ("preference.database_url", None, "honed-preference must have one replica, and a volume at /var/lib/honed"),
        ("queue.password_file", "/etc/honed/vault/redis", "the manifests mount /etc/honed/redis: name a password there"),
        ("tracking.mlflow", {}, "write http://mlflow.mlflow.svc:5000 (component tracking), or yours"),
        ("tracking.mlflow.uri", "/var/lib/honed/mlruns", "on the conductor's own volume"),
        ("tracking.wandb", {}, "honed[wandb] must be installed in the image honed"),
        ("generation.replicas", 3, "the replicas of Deployment honed-generation decide"),
        ("security.authentication", False, "whoever reaches a Pod may call everything"),
        ("learner.ptx", {"data": "demonstrations"}, "the overlay needs the component learner-data"),
        ("learner.metrics_port", 9191, "name 9090: write 9090, or patch them, too"),
        (
            "reward.scorers",
            [{"name": "own", "kind": "function", "source": "own"}],
            "must be installed in the image honed-reward",
        ),
        ("reward.scorers", [{"name": "r", "kind": "remote", "source": "there:1"}], "the overlay needs the component scorers"),
        (
            "reward.scorers",
            [{"name": "j", "kind": "function", "source": "llm_judge", "options": {"base_url": "https://h/v1", "model": "m"}}],
            "the overlay needs the component scorers",
        ),
    ],
)
def test_what_depends_on_the_overlay_is_a_warning(tmp_path: Path, key: str, value: Any, words: str) -> None:
    report = checked(tmp_path, changed(key, value))
    assert report.errors == []
    assert any(finding.where == key.removesuffix(".0") or key in finding.where for finding in report.findings)
    assert any(words in finding.text for finding in report.findings)


def test_all_is_told_at_once(tmp_path: Path) -> None:
    """A run file of one machine."""
    found = {finding.where for finding in checked(tmp_path, {"data": {"prompts": "p.jsonl"}}).errors}
    assert {"conductor.launcher", "directory", "security.tokens", "queue.url", "policy.url", "data.prompts"} <= found
    assert {f"{name}.{key}" for name in SERVICES for key in ("host", "port", "address")} <= found


def test_the_command_refuses_and_asks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed("data.prompts", "prompts.jsonl")))
    environment = {"KUBECONFIG": str(tmp_path / "none")}
    for arguments in (["check", str(path), "--cluster"], ["check", "--cluster", str(path)]):
        done = CliRunner().invoke(app, arguments, env=environment)
        assert done.exit_code == 1
        assert "data.prompts" in done.stdout
        assert "1 errors, 1 warnings" in done.stderr
    told = json.loads(CliRunner().invoke(app, ["check", str(path), "--cluster", "--json"], env=environment).stdout)
    assert (told["ok"], told["findings"][-1]["where"]) == (False, "data.prompts")
    path.write_text(yaml.safe_dump(cluster_tree()))
    assert CliRunner().invoke(app, ["check", str(path), "--cluster"], env=environment).exit_code == 0
    path.write_text("learner: {bach: 3}")
    assert "did you mean learner.batch?" in CliRunner().invoke(app, ["check", str(path), "--cluster"], env=environment).stderr
