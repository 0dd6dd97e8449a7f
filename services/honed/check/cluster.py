"""Checks whether a cluster can honour a run file: nothing in it may lie on one machine, or lead to one. Asks nobody.

What the Pods mount, and where, is what the manifests under deploy/ say: `/data` holds the run's files, `/etc/honed` what comes
from Secrets and ConfigMaps, `/var/lib/honed` what the services write. Everything else of their file system is the image's and
read-only.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from pydantic import SecretStr

from honed.check.findings import Report
from honed.config import RunSettings
from honed.kit.server import is_loopback
from honed.settings import ReplicatedSettings, ServerSettings
from honed.settings_file import explain_settings, load_settings
from honed.topology import SERVICES
from honed.tracking.settings import mlflow_path

DATA: Final = "/data"
CONFIGURATION: Final = "/etc/honed"
STATE: Final = "/var/lib/honed"
STORE: Final = f"{STATE}/policy"
_PORTS: Final = {"port": 50051, "control_port": 50052, "health_port": 8081, "metrics_port": 9090}
_BUILT_IN: Final = (
    "exact_match",
    "json_schema",
    "length",
    "llm_judge",
    "matches",
    "number_match",
    "repetition",
    "unit_tests",
)
"""Functions that the image has; those of honed[metrics] are not among them."""
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
    _check_store(settings, report)
    _check_database(settings, report)
    _check_data(settings, report)
    _check_training(settings, report)
    _check_scorers(settings, report)
    return settings, report


def is_path(url: str) -> bool:
    """Whether the URL of a store is a directory, and not an object store."""
    return "://" not in url or url.startswith(("file://", "local://"))


def is_sqlite(settings: RunSettings) -> bool:
    """Whether the record of judgements is a file."""
    return settings.database_url.startswith("sqlite")


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
    if section.start_from is not None and not _under(section.start_from, DATA):
        report.error("conductor.start_from", _elsewhere(section.start_from, DATA, "a model directory"))
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
        _check_mounted(f"security.tls.{name}", getattr(security.tls, name), f"{CONFIGURATION}/tls", "a certificate", report)


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
    elif _leads_here(section.address):
        report.error(f"{name}.address", f"is {section.address}, which is each Pod itself: write {wanted}")
    control = getattr(section, "control_address", None)
    if control is not None and _leads_here(control):
        report.error(f"{name}.control_address", f"is {control}: leave it out, since each Pod sets its own")


def _check_redis(settings: RunSettings, report: Report) -> None:
    queue = settings.queue
    if queue.url is None:
        report.error(
            "queue.url",
            "is not set: an embedded Redis serves one machine; write redis://honed-redis:6379/0 (component redis), or yours",
        )
    elif not queue.url.startswith(("redis://", "rediss://")) or _is_here(urlsplit(queue.url).hostname or ""):
        report.error(
            "queue.url", f"is {_public(queue.url)}, which each Pod would look for in itself: write redis://honed-redis:6379/0"
        )
    _check_mounted("queue.password_file", queue.password_file, f"{CONFIGURATION}/redis", "a password", report)


def _check_telemetry(settings: RunSettings, report: Report) -> None:
    endpoint, file = settings.telemetry.otlp_endpoint, settings.telemetry.headers_file
    if endpoint is not None and _is_here(urlsplit(endpoint).hostname or ""):
        report.error(
            "telemetry.otlp_endpoint",
            f"is {endpoint}, which each Pod would look for in itself: name a collector that the cluster reaches, or leave it "
            "out and add the component tracing",
        )
    if file is not None and not _under(file, CONFIGURATION):
        report.error(
            "telemetry.headers_file", _elsewhere(file, f"{CONFIGURATION}/telemetry/headers", "what the collector asks for")
        )


def _check_tracking(settings: RunSettings, report: Report) -> None:
    tracking, server = settings.tracking, "http://mlflow.mlflow.svc:5000 (component tracking), or yours"
    if tracking.mlflow is not None and (uri := tracking.mlflow.uri) is None:
        report.warning("tracking.mlflow.uri", f"is not set, unless the overlay sets it: write {server}")
    elif tracking.mlflow is not None and uri is not None:
        path = mlflow_path(uri)
        if path is not None and not _under(path, STATE):
            report.error("tracking.mlflow.uri", f"is {uri}, a path that the conductor's Pod cannot write: name {server}")
        elif path is not None:
            report.warning("tracking.mlflow.uri", f"is {uri}, on the conductor's own volume, where no MLflow server looks")
        elif _is_here(urlsplit(uri).hostname or ""):
            report.error("tracking.mlflow.uri", f"is {_public(uri)}, which the Pod would look for in itself: name {server}")
    directory = tracking.tensorboard and tracking.tensorboard.directory
    if directory is not None and not _under(directory, STATE):
        report.error("tracking.tensorboard.directory", _elsewhere(directory, STATE, "a directory"))
    for name in ("wandb", "tensorboard"):
        if getattr(tracking, name) is not None:
            report.warning(f"tracking.{name}", f"honed[{name}] must be installed in the image honed of the conductor")


def _check_store(settings: RunSettings, report: Report) -> None:
    url = settings.policy.url
    volume = f"{STORE} with the component store-volume"
    if url is None:
        report.error("policy.url", f"is not set: name an object store that every Pod reaches (s3://BUCKET/PATH), or {volume}")
    elif url.startswith("memory:"):
        report.error(
            "policy.url", f"is {url}, which no other process sees: name an object store (s3://BUCKET/PATH), or {volume}"
        )
    elif is_path(url):
        if os.path.normpath(url.removeprefix("file://").removeprefix("local://")) != STORE:
            report.error(
                "policy.url",
                f"is {url}, a path that no volume is shared at, so that each Pod would have a store of its own: name an object "
                f"store (s3://BUCKET/PATH), or {volume}",
            )
        else:
            report.warning("policy.url", f"is {url}: the overlay needs the component store-volume, or a store of its own there")
    elif _is_here(urlsplit(url).hostname or ""):
        report.error("policy.url", f"is {_public(url)}, which leads each Pod to itself: name a store that all of them reach")


def _check_database(settings: RunSettings, report: Report) -> None:
    where, url = "preference.database_url", settings.database_url
    file = settings.preference.database_password_file
    _check_mounted("preference.database_password_file", file, f"{CONFIGURATION}/database", "a password", report)
    if is_sqlite(settings):
        path = url.partition("///")[2]
        if not _under(path, STATE):
            report.error(where, f"is SQLite at {path}: write a file under {STATE}, or postgresql://… for more than one replica")
        else:
            report.warning(
                where,
                "is SQLite, unless the overlay sets another (component postgres): honed-preference must have one replica, and "
                f"a volume at {STATE}",
            )
    elif _is_here(_database_host(url)):
        report.error(where, f"is {_public(url)}, which leads the Pod to itself: name the server that the cluster reaches")


def _check_data(settings: RunSettings, report: Report) -> None:
    for key, path in _files(settings):
        if not _under(path, DATA):
            report.error(key, _elsewhere(path, DATA, "a file"))
    if settings.learner.ptx is not None:
        report.warning(
            "learner.ptx",
            f"the learner reads data.{settings.learner.ptx.data} too: the overlay needs the component learner-data",
        )


def _check_training(settings: RunSettings, report: Report) -> None:
    body = settings.reward_training.start_from
    if body is not None and not _under(body, DATA):
        report.error("reward_training.start_from", _elsewhere(body, DATA, "a model directory"))
    if settings.reuse is not None and not _under(settings.reuse, STATE):
        report.error("reuse", f"is {settings.reuse}, a directory that no Pod can write to: leave it out")


def _check_scorers(settings: RunSettings, report: Report) -> None:
    for number, scorer in enumerate(settings.reward.scorers):
        where = f"reward.scorers.{number}"
        if scorer.kind == "function" and scorer.source not in _BUILT_IN:
            report.warning(f"{where}.source", f"{scorer.source} must be installed in the image honed-reward")
        if scorer.kind == "remote" or scorer.source == "llm_judge":
            report.warning(
                f"{where}.source", "asks somebody else: the overlay needs the component scorers, or a policy of yours"
            )
        if scorer.kind == "remote":
            options = scorer.remote()
            tls = options.tls
            files = {"token_file": options.token_file}
            files |= {} if tls is None else {f"tls.{name}": getattr(tls, name) for name in ("authority", "certificate", "key")}
            for key, path in files.items():
                _check_mounted(f"{scorer.options_field}.{key}", path, CONFIGURATION, "the file", report)
        for key, source in scorer.models:
            if not source.startswith("artifact:") and source != "trained" and not _under(source, DATA):
                report.error(
                    f"{where}.{key}", _elsewhere(source, DATA, "a model directory, or write trained or artifact:NAME/VERSION")
                )
    for number, root in enumerate(settings.reward.allowed_roots):
        if not (_under(root, DATA) or _under(root, STATE)):
            report.error(f"reward.allowed_roots.{number}", _elsewhere(root, DATA, "a directory of models"))


def _files(settings: RunSettings) -> Iterator[tuple[str, Any]]:
    data = settings.data
    yield from ((f"data.texts.{number}", path) for number, path in enumerate(data.texts))
    yield from ((f"data.demonstrations.{number}", path) for number, path in enumerate(data.demonstrations))
    yield from ((f"data.judgements.{number}.file", source.file) for number, source in enumerate(data.judgements))
    if data.prompts is not None:
        yield "data.prompts", data.prompts
    if data.evaluation.prompts is not None:
        yield "data.evaluation.prompts", data.evaluation.prompts
    if data.evaluation.judgements is not None:
        yield "data.evaluation.judgements.file", data.evaluation.judgements.file


def _check_mounted(key: str, path: Path | None, usual: str, what: str, report: Report) -> None:
    """A file of a Secret: at the directory that the manifests mount, or at another that an overlay may mount."""
    if path is None or _under(path, usual):
        return
    if _under(path, CONFIGURATION):
        report.warning(key, f"is {path}, and the manifests mount {usual}: name {what} there, or mount yours")
    else:
        report.error(key, _elsewhere(path, usual, what))


def _elsewhere(path: Any, root: str, what: str) -> str:
    return f"is {path}, a path of this machine that no Pod has: name {what} under {root}"


def _under(path: Any, root: str) -> bool:
    return Path(os.path.normpath(path)).is_relative_to(root)


def _leads_here(address: str) -> bool:
    """Whether a gRPC target, or one of several in it, is the Pod itself."""
    scheme, colon, rest = address.partition(":")
    if colon and scheme in ("unix", "unix-abstract"):
        return True
    if colon and scheme in ("dns", "ipv4", "ipv6"):
        address = rest.rpartition("/")[2]
    try:
        return any(_is_here(urlsplit(f"//{part}").hostname or "") for part in address.split(","))
    except ValueError:
        return False  # no address at all, which gRPC tells


def _database_host(url: str) -> str:
    """The host of a database's URL; without one it is a socket of this machine."""
    parts = urlsplit(url)
    host = parts.hostname or parse_qs(parts.query).get("host", ["localhost"])[0]
    return "localhost" if host.startswith("/") else host


def _is_here(host: str) -> bool:
    return is_loopback(host) or host in ("0.0.0.0", "::")  # noqa: S104  # whoever calls these reaches itself


def _public(url: str) -> str:
    """A URL without its password."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":…@") if parts.password else url
