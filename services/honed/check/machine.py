"""Checks the machine and the services around a run: memory, disk, ports, Redis, database, store, scorers, engine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import uuid
from pathlib import Path
from typing import Final

from honed.artifacts.files import open_backend
from honed.check.findings import Report
from honed.check.memory import BYTES, check_memory, has_gpu, rounded, trained_models
from honed.check.model import BaseModel
from honed.config import RunSettings
from honed.kit.address import host_port, resolved
from honed.kit.errors import DataLoss, FailedPrecondition, HonedError, InvalidArgument
from honed.models.prompts import read_tokenizer
from honed.reward.settings import ScorerSettings
from honed.settings import ServerSettings
from honed.telemetry import collector_endpoint, read_headers
from honed.tracking.start import check_tracking

_GIB: Final = 1 << 30
_CHECKPOINT: Final = 12  # weight and two moments of a parameter, float32
_PORTS: Final = ("port", "control_port", "health_port", "metrics_port")
_REDIS_VERSION: Final = (6, 2)
_REMOTE_S: Final = 5.0


def check_machine(settings: RunSettings, report: Report, model: BaseModel | None, body: int | None = None) -> None:
    """Checks what can be checked without starting anything; `body`: parameters of the reward model's body, if of its own."""
    if settings.conductor.services_elsewhere:
        _check_addresses(settings, report)  # the services have machines of their own
    else:
        if model is not None:
            check_memory(settings, report, model.parameters, body)
            _check_disk(settings, report, model.parameters)
        _check_devices(settings, report)
        _check_ports(settings, report)
    _check_redis(settings, report)
    _check_store(settings, report)
    _check_database(settings, report)
    _check_scorers(settings, report)
    _check_truncation(settings, report, model)
    _check_files(settings, report)
    _check_reuse(settings, report)
    _check_telemetry(settings, report)
    _check_tracking(settings, report)


def _check_reuse(settings: RunSettings, report: Report) -> None:
    """A warning: the jobs train what they cannot take, and go on where they cannot keep it."""
    if settings.reuse is None:
        return
    place = _existing(settings.reuse)
    if not place.is_dir() or not os.access(place, os.W_OK):
        report.warning(
            "reuse", f"{settings.reuse} cannot be made or written ({place}): every model is trained, and none is kept"
        )


def _check_telemetry(settings: RunSettings, report: Report) -> None:
    try:
        endpoint = collector_endpoint(settings.telemetry, os.environ)
        if endpoint is not None and settings.telemetry.headers_file is not None:
            read_headers(settings.telemetry.headers_file)
    except ValueError as error:
        report.error("telemetry", str(error))
        return
    if endpoint is not None and importlib.util.find_spec("opentelemetry.exporter.otlp.proto.grpc") is None:
        report.error("telemetry", f"traces are to go to {endpoint}, and what exports them is missing: install honed[tracing]")


def _check_tracking(settings: RunSettings, report: Report) -> None:
    try:
        check_tracking(settings)
    except (FailedPrecondition, ValueError) as error:
        report.error("tracking", str(error))


def disk_needed(settings: RunSettings, parameters: int) -> dict[str, float]:
    """GiB by use."""
    version = parameters * BYTES[settings.generation.weights_dtype] / _GIB
    learner = settings.learner
    checkpoint = trained_models(settings) * parameters * _CHECKPOINT / _GIB
    return {
        f"{learner.keep_checkpoints + 1} checkpoints": (learner.keep_checkpoints + 1) * checkpoint,
        f"{settings.policy.keep + 2} versions": (settings.policy.keep + 2) * version,
        "versions that generators have fetched": 3 * settings.generation.replicas * version,
        "journal": learner.journal_mb / 1024,
    }


def _check_disk(settings: RunSettings, report: Report, parameters: int) -> None:
    parts = disk_needed(settings, parameters)
    needed = sum(parts.values())
    free = shutil.disk_usage(_existing(settings.directory)).free / _GIB
    report.figures["disk_gib"] = {**rounded(parts), "needed": round(needed, 2), "free": round(free, 2)}
    if needed > free:
        bill = "; ".join(f"{name} {gib:.1f}" for name, gib in parts.items() if gib >= 0.05)
        report.error(
            "directory",
            f"{settings.directory} needs about {needed:.1f} GiB ({bill}), and {free:.1f} GiB are free: choose another, or keep "
            "fewer versions (policy.keep) and checkpoints (learner.keep_checkpoints)",
        )
    if not os.access(_existing(settings.directory), os.W_OK):
        report.error("directory", f"{settings.directory} cannot be written: choose another")


def _check_devices(settings: RunSettings, report: Report) -> None:
    if settings.generation.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        report.error("generation.engine", "vllm is not installed: install it, or set transformers or auto")
    if settings.generation.engine != "transformers" and not has_gpu():
        if settings.generation.tensor_parallel > 1:
            report.error("generation.tensor_parallel", "is over 1, and this machine has no GPU: leave it at 1")
        if settings.generation.cuda_graphs:
            report.error("generation.cuda_graphs", "is set, and this machine has no GPU: leave it out")
    asked = {
        f"{name}.device": getattr(getattr(settings, name), "device", "")
        for name in ("learner", "generation", "reward", "reward_training", "pretrain")
    }
    wanted = [field for field, device in asked.items() if str(device).startswith("cuda")]
    if wanted:
        import torch

        if not torch.cuda.is_available():
            for field in wanted:
                report.error(field, f"is {asked[field]}, and this machine has no GPU that torch can use: set auto or cpu")


def _check_ports(settings: RunSettings, report: Report) -> None:
    taken: dict[tuple[str, int], str] = {}
    for name in type(settings).model_fields:
        section = getattr(settings, name)
        if not isinstance(section, ServerSettings):
            continue
        for field in _PORTS:
            port = getattr(section, field, 0)
            if not port:
                continue
            where = f"{name}.{field}"
            if other := taken.get((section.host, port)):
                report.error(where, f"is {port}, as {other}: give each its own, or 0 for a free one")
                continue
            taken[section.host, port] = where
            try:
                family, address = resolved(section.host)
                with socket.socket(family) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((address, port))
            except OSError as error:
                at = host_port(section.host, port)
                report.error(where, f"cannot listen on {at} ({error.strerror}): choose another, or 0")


def _check_addresses(settings: RunSettings, report: Report) -> None:
    from honed.runtime import check_addresses

    try:
        check_addresses(settings)
    except FailedPrecondition as error:
        report.error("conductor.launcher", str(error))


def _check_redis(settings: RunSettings, report: Report) -> None:
    from honed.queue.embedded import redis_server_binary
    from honed.runtime import redis_url

    if settings.queue.url is None:
        if settings.conductor.services_elsewhere:
            said = f"is not set, and conductor.launcher is {settings.conductor.launcher}"
            report.error("queue.url", f"{said}: name the Redis that all services share")
            return
        try:
            redis_server_binary()
        except FailedPrecondition as error:
            report.error("queue.url", str(error))
        return
    import redis

    from honed.queue.connection import without_password

    shown = without_password(settings.queue.url)
    try:
        with redis.Redis.from_url(redis_url(settings), socket_timeout=5.0, socket_connect_timeout=5.0) as client:
            version = str(client.info("server")["redis_version"])
    except (redis.RedisError, OSError, ValueError) as error:
        report.error("queue.url", f"Redis at {shown} does not answer ({error}): start it, or correct the URL or the password")
        return
    if tuple(int(part) for part in version.split(".")[:2]) < _REDIS_VERSION:
        report.error("queue.url", f"Redis at {shown} is {version}; 6.2 or newer is needed")
    report.figures["redis_version"] = version


def _check_store(settings: RunSettings, report: Report) -> None:
    url = settings.policy.url
    if url is None:
        return  # in the run's directory, which is checked
    try:
        backend = open_backend(url, 10.0)
        probe = backend.join(f".honed-check-{uuid.uuid4().hex}")
        backend.write(probe, b"honed check")
        backend.remove(probe)
    except (HonedError, OSError) as error:
        report.error("policy.url", f"{url} cannot be written ({error}): correct the URL, or the rights of whoever runs this")


def _check_database(settings: RunSettings, report: Report) -> None:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    where = "preference.database_url"
    try:
        url = make_url(settings.database_url)
    except ArgumentError:
        report.error(where, "is no SQLAlchemy URL: write sqlite+aiosqlite:///FILE or postgresql+asyncpg://USER@HOST/NAME")
        return
    if url.get_backend_name() == "sqlite":
        if url.database and not os.access(_existing(Path(url.database)), os.W_OK):
            report.error(where, f"{url.database} cannot be written: choose another file")
        return
    try:
        socket.create_connection((url.host or "localhost", url.port or 5432), timeout=5.0).close()
    except OSError as error:
        report.error(where, f"the database server {url.host}:{url.port or 5432} does not answer ({error}): start it")


def _check_scorers(settings: RunSettings, report: Report) -> None:
    from honed.reward.function_scorer import find_function
    from honed.reward.scorer import check_longest

    if not settings.reward.scorers and settings.samples_rollouts and settings.goes_through("online"):
        report.error(
            "reward.scorers", "names none: training needs a reward; write {name: ..., kind: reward_model, source: trained}"
        )
    longest: dict[str, float] = {}
    for number, scorer in enumerate(settings.reward.scorers):
        where = f"reward.scorers.{number}"
        if scorer.kind == "function":
            try:
                longest[scorer.name] = find_function(scorer.name, scorer.source, scorer.options).longest_s
            except InvalidArgument as error:
                report.error(error.field, error.reason)
            except HonedError as error:
                report.error(f"{where}.source", str(error))
        if scorer.kind == "remote":
            longest[scorer.name] = scorer.remote().deadline_s
            _check_remote(scorer, where, report)
        for key, source in scorer.models:
            if not (_is_artifact(source) or (Path(source) / "config.json").is_file()):
                report.error(
                    f"{where}.{key}", f"{source} is no model directory: name one, or `trained`, or artifact:NAME/VERSION"
                )

    try:
        check_longest(longest.items())
    except InvalidArgument as error:
        report.error(error.field, error.reason)


def _check_remote(scorer: ScorerSettings, where: str, report: Report) -> None:
    """Files are read here; a service that is not there yet may come later."""
    from honed._client.errors import RequestError
    from honed.reward.remote_scorer import RemoteScorer

    options = scorer.remote()
    try:
        there = RemoteScorer(scorer.name, scorer.source, options).scorers(_REMOTE_S)
    except FailedPrecondition as error:
        report.error(scorer.options_field, str(error))
    except RequestError as error:
        report.warning(f"{where}.source", f"{scorer.source} does not list its scorers: {error}")
    else:
        if options.scorer is not None and options.scorer not in there:
            report.error(
                f"{scorer.options_field}.scorer", f"{scorer.source} has no {options.scorer!r}, only {', '.join(there)}"
            )


def _check_truncation(settings: RunSettings, report: Report, model: BaseModel | None) -> None:
    """Also in the fast check: the reward service would fail for ever, long after the start."""
    truncate = settings.reward.truncate
    if truncate is None or model is None or model.directory is None:
        return
    try:
        tokenizer = model.tokenizer or read_tokenizer(model.directory)
    except DataLoss:
        return  # a finding of the model's
    ids = tokenizer.encode(truncate.token_text, add_special_tokens=False).ids
    if len(ids) != 1:
        report.error(
            "reward.truncate.token_text",
            f"{truncate.token_text!r} is {len(ids)} tokens of the model; name a text that is a single one",
        )


def _check_files(settings: RunSettings, report: Report) -> None:
    """Files and functions that are named and read later."""
    from honed.queue.application import load_redactor

    tls, redact = settings.security.tls, settings.conductor.application_prompts.redact
    named = {"queue.password_file": settings.queue.password_file}
    if tls is not None:
        named |= {f"security.tls.{name}": getattr(tls, name) for name in type(tls).model_fields}
    for where, path in named.items():
        if path is not None and not os.access(path, os.R_OK):
            report.error(where, f"{path} cannot be read: correct the path, or the rights of whoever runs this")
    if redact is not None:
        try:
            load_redactor(redact)
        except InvalidArgument as error:
            report.error(error.field, error.reason)


def _is_artifact(source: str) -> bool:
    return source == "trained" or source.startswith("artifact:")


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
