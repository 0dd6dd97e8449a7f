"""What a run file says of files, stores and scorers, as a cluster sees them."""

from __future__ import annotations

import os.path
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from honed.check.cluster_places import CONFIGURATION, DATA, STATE, STORE, check_mounted, elsewhere, is_here, public_url, under
from honed.check.findings import Report
from honed.config import RunSettings

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


def check_stores(settings: RunSettings, report: Report) -> None:
    """Versions and judgements: where all of the Pods that need them find them."""
    _check_store(settings, report)
    _check_database(settings, report)


def check_files(settings: RunSettings, report: Report) -> None:
    """What is read to train, and what is kept of it."""
    _check_data(settings, report)
    _check_training(settings, report)


def is_path(url: str) -> bool:
    """Whether the URL of a store is a directory, and not an object store."""
    return "://" not in url or url.startswith(("file://", "local://"))


def is_sqlite(settings: RunSettings) -> bool:
    """Whether the record of judgements is a file."""
    return settings.database_url.startswith("sqlite")


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
    elif is_here(urlsplit(url).hostname or ""):
        report.error("policy.url", f"is {public_url(url)}, which leads each Pod to itself: name a store that all of them reach")


def _check_database(settings: RunSettings, report: Report) -> None:
    where, url = "preference.database_url", settings.database_url
    file = settings.preference.database_password_file
    check_mounted("preference.database_password_file", file, f"{CONFIGURATION}/database", "a password", report)
    if is_sqlite(settings):
        path = url.partition("///")[2]
        if not under(path, STATE):
            report.error(where, f"is SQLite at {path}: write a file under {STATE}, or postgresql://… for more than one replica")
        else:
            report.warning(
                where,
                "is SQLite, unless the overlay sets another (component postgres): honed-preference must have one replica, and "
                f"a volume at {STATE}",
            )
    elif is_here(_database_host(url)):
        report.error(where, f"is {public_url(url)}, which leads the Pod to itself: name the server that the cluster reaches")


def _check_data(settings: RunSettings, report: Report) -> None:
    for key, path in _files(settings):
        if not under(path, DATA):
            report.error(key, elsewhere(path, DATA, "a file"))
    if settings.learner.ptx is not None:
        report.warning(
            "learner.ptx",
            f"the learner reads data.{settings.learner.ptx.data} too: the overlay needs the component learner-data",
        )


def _check_training(settings: RunSettings, report: Report) -> None:
    body = settings.reward_training.start_from
    if body is not None and not under(body, DATA):
        report.error("reward_training.start_from", elsewhere(body, DATA, "a model directory"))
    if settings.reuse is not None and not under(settings.reuse, STATE):
        report.error("reuse", f"is {settings.reuse}, a directory that no Pod can write to: leave it out")


def check_scorers(settings: RunSettings, report: Report) -> None:
    """What scorers need: packages of the image, other servers, files of Secrets, and models."""
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
                check_mounted(f"{scorer.options_field}.{key}", path, CONFIGURATION, "the file", report)
        for key, source in scorer.models:
            if not source.startswith("artifact:") and source != "trained" and not under(source, DATA):
                report.error(
                    f"{where}.{key}", elsewhere(source, DATA, "a model directory, or write trained or artifact:NAME/VERSION")
                )
    for number, root in enumerate(settings.reward.allowed_roots):
        if not (under(root, DATA) or under(root, STATE)):
            report.error(f"reward.allowed_roots.{number}", elsewhere(root, DATA, "a directory of models"))


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


def _database_host(url: str) -> str:
    """The host of a database's URL; without one it is a socket of this machine."""
    parts = urlsplit(url)
    host = parts.hostname or parse_qs(parts.query).get("host", ["localhost"])[0]
    return "localhost" if host.startswith("/") else host
