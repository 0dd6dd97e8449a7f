"""Checks whether a cluster can honour a run file: nothing in it may lie on one machine, or lead to one. Asks nobody."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from pydantic import SecretStr

from honed.check.cluster_files import check_files, check_scorers, check_stores
from honed.check.cluster_places import (
    CONFIGURATION,
    DATA,
    STATE,
    check_mounted,
    elsewhere,
    is_here,
    leads_here,
    public_url,
    under,
)
from honed.check.findings import Report
from honed.config import RunSettings
from honed.kit.server import is_loopback
from honed.settings import ReplicatedSettings, ServerSettings
from honed.settings_file import explain_settings, load_settings
from honed.topology import SERVICES
from honed.tracking.settings import mlflow_path

_PORTS: Final = {"port": 50051, "control_port": 50052, "health_port": 8081, "metrics_port": 9090}
_OF_A_POD: Final = {
    "conductor.kubernetes.namespace": "the conductor has the rights of its own namespace alone",
    "conductor.kubernetes.kubeconfig": "a Pod has its service account",
    "conductor.kubernetes.context": "a Pod has its service account, and no kubeconfig",
    "conductor.kubernetes.identity": "each Pod has its own, and two conductors of one name would both hold the Lease",
}
"""What each Pod knows by itself, with why a run file for all of them cannot say it."""


def check_cluster(run_file: Path) -> tuple[RunSettings, Report]:
    """Reads a run file, and finds what a cluster cannot honour.

    Raises:
        SettingsError: the file is no run file at all.
    """
    settings, report = load_settings(run_file), Report()
    _check_secrets(run_file, report)
    _check_own(run_file, report)
    _check_conductor(settings, report)
    _check_state(settings, report)
    _check_services(settings, report)
    _check_redis(settings, report)
    _check_telemetry(settings, report)
    _check_tracking(settings, report)
    check_stores(settings, report)
    check_files(settings, report)
    check_scorers(settings, report)
    return settings, report


def _check_secrets(run_file: Path, report: Report) -> None:
    """A run file becomes a ConfigMap, which many may read."""
    for key, value, source in explain_settings(run_file):
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if source != "file" or not isinstance(text, str):
            continue
        if key == "queue.password" or ("://" in text and urlsplit(text).password):
            instead = f"HONED_{key.upper().replace('.', '__')} from a Secret"
            if key.startswith("queue."):
                instead = f"queue.password_file: {CONFIGURATION}/redis/password"
            report.error(key, f"holds a password, and a run file is a ConfigMap there: take it out, and set {instead}")


def _check_own(run_file: Path, report: Report) -> None:
    for key, value, source in explain_settings(run_file):
        if source == "file" and value is not None and key in _OF_A_POD:
            report.error(key, f"is {value}: leave it out; {_OF_A_POD[key]}")


def _check_conductor(settings: RunSettings, report: Report) -> None:
    section = settings.conductor
    if section.launcher == "process":
        report.error(
            "conductor.launcher",
            "is process, which starts every service inside the conductor's Pod: write kubernetes, which starts jobs alone and "
            "waits for the services that are deployed",
        )
    elif section.launcher == "none":
        report.warning("conductor.launcher", "is none: nobody starts the training jobs; kubernetes does")
    if section.start_from is not None and not under(section.start_from, DATA):
        report.error("conductor.start_from", elsewhere(section.start_from, DATA, "a model directory"))
    if section.application_prompts.redact is not None:
        report.warning(
            "conductor.application_prompts.redact",
            f"{section.application_prompts.redact} must be installed in the images of generation",
        )


def _check_state(settings: RunSettings, report: Report) -> None:
    if os.path.normpath(settings.directory) != STATE:
        report.error("directory", f"is {settings.directory}: the services can write to {STATE} alone; write that")
    security = settings.security
    if not security.authentication:
        report.warning("security.authentication", "is off: whoever reaches a Pod may call everything")
    elif security.tokens is None or os.path.normpath(security.tokens) != f"{CONFIGURATION}/tokens":
        was = "is not set, so that each Pod would make tokens that no other knows" if security.tokens is None else ""
        report.error(
            "security.tokens", f"{was or f'is {security.tokens}'}: write {CONFIGURATION}/tokens, where the Secrets are mounted"
        )
    for name in ("authority", "certificate", "key") if security.tls else ():
        check_mounted(f"security.tls.{name}", getattr(security.tls, name), f"{CONFIGURATION}/tls", "a certificate", report)


def _check_services(settings: RunSettings, report: Report) -> None:
    for name in SERVICES:
        section: ServerSettings = getattr(settings, name)
        if is_loopback(section.host):
            alone = f"is {section.host}, where only the Pod itself can call it, and no probe reaches it"
            report.error(f"{name}.host", f"{alone}: write 0.0.0.0")
        for field, usual in _PORTS.items():
            port = getattr(section, field, usual)
            named = f"the manifests' probes, Services and policies name {usual}"
            if not port:
                report.error(f"{name}.{field}", f"is not set, so that each Pod would choose one, and {named}: write {usual}")
            elif port != usual:
                report.warning(f"{name}.{field}", f"is {port}, and {named}: write {usual}, or patch them, too")
        _check_address(name, section, report)
        if isinstance(section, ReplicatedSettings) and section.replicas > 1:
            report.warning(
                f"{name}.replicas",
                f"is {section.replicas} and has no effect: the replicas of Deployment honed-{name} decide, or its autoscaler",
            )


def _check_address(name: str, section: ServerSettings, report: Report) -> None:
    wanted = f"dns:///honed-{name}:50051"
    if section.address is None:
        report.error(f"{name}.address", f"is not set, and nobody else would find the service: write {wanted}")
    elif leads_here(section.address):
        report.error(f"{name}.address", f"is {section.address}, which is each Pod itself: write {wanted}")
    control = getattr(section, "control_address", None)
    if control is not None and leads_here(control):
        report.error(f"{name}.control_address", f"is {control}: leave it out, since each Pod sets its own")


def _check_redis(settings: RunSettings, report: Report) -> None:
    queue = settings.queue
    if queue.url is None:
        report.error(
            "queue.url",
            "is not set: an embedded Redis serves one machine; write redis://honed-redis:6379/0 (component redis), or yours",
        )
    elif not queue.url.startswith(("redis://", "rediss://")) or is_here(urlsplit(queue.url).hostname or ""):
        report.error(
            "queue.url",
            f"is {public_url(queue.url)}, which each Pod would look for in itself: write redis://honed-redis:6379/0",
        )
    check_mounted("queue.password_file", queue.password_file, f"{CONFIGURATION}/redis", "a password", report)


def _check_telemetry(settings: RunSettings, report: Report) -> None:
    endpoint, file = settings.telemetry.otlp_endpoint, settings.telemetry.headers_file
    if endpoint is not None and is_here(urlsplit(endpoint).hostname or ""):
        report.error(
            "telemetry.otlp_endpoint",
            f"is {endpoint}, which each Pod would look for in itself: name a collector that the cluster reaches, or leave it "
            "out and add the component tracing",
        )
    if file is not None and not under(file, CONFIGURATION):
        report.error(
            "telemetry.headers_file", elsewhere(file, f"{CONFIGURATION}/telemetry/headers", "what the collector asks for")
        )


def _check_tracking(settings: RunSettings, report: Report) -> None:
    tracking, server = settings.tracking, "http://mlflow.mlflow.svc:5000 (component tracking), or yours"
    if tracking.mlflow is not None and (uri := tracking.mlflow.uri) is None:
        report.warning("tracking.mlflow.uri", f"is not set, unless the overlay sets it: write {server}")
    elif tracking.mlflow is not None and uri is not None:
        path = mlflow_path(uri)
        if path is not None and not under(path, STATE):
            report.error("tracking.mlflow.uri", f"is {uri}, a path that the conductor's Pod cannot write: name {server}")
        elif path is not None:
            report.warning("tracking.mlflow.uri", f"is {uri}, on the conductor's own volume, where no MLflow server looks")
        elif is_here(urlsplit(uri).hostname or ""):
            report.error("tracking.mlflow.uri", f"is {public_url(uri)}, which the Pod would look for in itself: name {server}")
    directory = tracking.tensorboard and tracking.tensorboard.directory
    if directory is not None and not under(directory, STATE):
        report.error("tracking.tensorboard.directory", elsewhere(directory, STATE, "a directory"))
    for name in ("wandb", "tensorboard"):
        if getattr(tracking, name) is not None:
            report.warning(f"tracking.{name}", f"honed[{name}] must be installed in the image honed of the conductor")
