"""Checks the machine that a run is to have: memory, disk, devices, ports, files."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from typing import Final

from honed.check.bills import BYTES, GIB, checkpoint_gib
from honed.check.findings import Report, existing
from honed.check.memory import check_memory, has_gpu, rounded
from honed.check.model import BaseModel
from honed.conductor.cores import cores_beside
from honed.config import RunSettings
from honed.kit.address import host_port, resolved
from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.settings import ServerSettings

_PORTS: Final = ("port", "control_port", "health_port", "metrics_port")


def check_machine(settings: RunSettings, report: Report, model: BaseModel | None, body: int | None = None) -> None:
    """Checks what can be checked without starting anything; `body`: parameters of the reward model's body, if of its own."""
    if not settings.conductor.services_elsewhere:  # those have machines of their own
        if model is not None:
            check_memory(settings, report, model.parameters, body)
            _check_disk(settings, report, model.parameters)
        _check_devices(settings, report)
        _check_cores(settings, report)
        _check_ports(settings, report)
    _check_files(settings, report)
    _check_reuse(settings, report)


def _check_reuse(settings: RunSettings, report: Report) -> None:
    """A warning: the jobs train what they cannot take, and go on where they cannot keep it."""
    if settings.reuse is None:
        return
    place = existing(settings.reuse)
    if not place.is_dir() or not os.access(place, os.W_OK):
        report.warning(
            "reuse", f"{settings.reuse} cannot be made or written ({place}): every model is trained, and none is kept"
        )


def disk_needed(settings: RunSettings, parameters: int) -> dict[str, float]:
    """GiB by use."""
    version = parameters * BYTES[settings.generation.weights_dtype] / GIB
    learner = settings.learner
    checkpoint = checkpoint_gib(settings, parameters)
    return {
        f"{learner.keep_checkpoints + 1} checkpoints": (learner.keep_checkpoints + 1) * checkpoint,
        f"{settings.policy.keep + 2} versions": (settings.policy.keep + 2) * version,
        "versions that generators have fetched": 3 * settings.generation.replicas * version,
        "journal": learner.journal_mb / 1024,
    }


def _check_disk(settings: RunSettings, report: Report, parameters: int) -> None:
    parts = disk_needed(settings, parameters)
    needed = sum(parts.values())
    free = shutil.disk_usage(existing(settings.directory)).free / GIB
    report.figures["disk_gib"] = {**rounded(parts), "needed": round(needed, 2), "free": round(free, 2)}
    if needed > free:
        bill = "; ".join(f"{name} {gib:.1f}" for name, gib in parts.items() if gib >= 0.05)
        report.error(
            "directory",
            f"{settings.directory} needs about {needed:.1f} GiB ({bill}), and {free:.1f} GiB are free: choose another, or keep "
            "fewer versions (policy.keep) and checkpoints (learner.keep_checkpoints)",
        )
    if not os.access(existing(settings.directory), os.W_OK):
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
        "learner.device": settings.learner.device,
        "sft.device": settings.sft.device,
        "reward_training.device": settings.reward_training.device,
    }
    wanted = [field for field, device in asked.items() if device.startswith("cuda")]
    if wanted:
        import torch

        if not torch.cuda.is_available():
            for field in wanted:
                report.error(field, f"is {asked[field]}, and this machine has no GPU that torch can use: set auto or cpu")


def _check_cores(settings: RunSettings, report: Report) -> None:
    try:
        left = len(cores_beside(settings.learner.own_cores))
    except FailedPrecondition as error:
        report.error("learner.own_cores", str(error).removeprefix("learner.own_cores: "))
        return
    threads = settings.generation.threads * settings.generation.replicas
    if left and threads > left and not has_gpu():
        report.warning(
            "learner.own_cores",
            f"leaves {left} of this machine's cores, and generation computes with {threads} threads: it may be what training "
            "waits for",
        )


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
