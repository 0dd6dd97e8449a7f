"""The versions of a run for people: list, compare, promote, roll back."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from honed.artifacts.manifest import Manifest
from honed.artifacts.marks import Mark
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.conductor.fleet import Fleet
from honed.conductor.launcher import ProcessSpec
from honed.conductor.local_launcher import Limits, ProcessLauncher
from honed.conductor.sampling import prompts_of
from honed.conductor.scoring import scores
from honed.config import RunSettings
from honed.kit.errors import Aborted, FailedPrecondition, Unavailable
from honed.report.measures import distinct_n, mean
from honed.runtime import internal_channel
from honed.v1 import (
    common_pb2,
    conductor_pb2,
    generation_pb2,
    learner_pb2,
    learner_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
)
from honed.workspace import Workspace

COMPARED = 16
COMPARE_TIMEOUT_S = 3600.0
ROLLBACK_TIMEOUT_S = 600.0
POLL_S = 0.2


class Versions:
    """The versions of one run."""

    def __init__(self, settings: RunSettings, fleet: Fleet, store: PolicyStore, workspace: Workspace) -> None:
        """Reads nothing yet."""
        self._settings, self._fleet, self._store, self._workspace = settings, fleet, store, workspace
        self._comparing = asyncio.Lock()

    async def page(self, start: int, count: int) -> tuple[list[conductor_pb2.VersionInfo], int]:
        """The versions from `start` on, newest first, and how many there are in all."""
        return await asyncio.to_thread(self._list, start, count)

    async def info(self, version: VersionId) -> conductor_pb2.VersionInfo:
        """One version.

        Raises:
            NotFound: the store does not hold it.
        """
        return await asyncio.to_thread(self._info, version)

    async def promote(self, version: common_pb2.PolicyVersion, reason: str) -> conductor_pb2.VersionInfo:
        """Marks a version as promoted: neither it nor its checkpoint is removed from now on.

        Raises:
            NotFound: the store does not hold it.
            FailedPrecondition: it is quarantined.
        """
        chosen = await self._usable(version, "promoted")
        mark = Mark(reason or "promoted", datetime.now(tz=UTC).isoformat())
        await asyncio.to_thread(self._store.marks.add, chosen, "promoted", mark)
        return await self.info(chosen)

    async def roll_back(self, version: common_pb2.PolicyVersion, key: str) -> conductor_pb2.VersionInfo:
        """Lets the learner go back to a version; returns the new version with its weights once generators serve that.

        Raises:
            NotFound: the store does not hold it.
            FailedPrecondition: it is quarantined, or the learner cannot go back.
            Unavailable: the learner does not answer, or nobody serves the new version in time.
        """
        chosen = await self._usable(version, "served")
        request = learner_pb2.RollbackRequest(version=_message(self._settings.run, chosen), idempotency_key=key)
        async with internal_channel(self._settings, self._fleet.target("learner")) as channel:
            stub = learner_pb2_grpc.LearnerServiceStub(channel)
            try:
                answer = await stub.Rollback(request, timeout=ROLLBACK_TIMEOUT_S)
                new = VersionId(answer.version.fence, answer.version.step)
                await self._until_served(stub, new)
            except grpc.aio.AioRpcError as error:
                raise _of_learner(error) from error
        return await self.info(new)

    async def compare(self, request: conductor_pb2.CompareVersionsRequest) -> conductor_pb2.CompareVersionsResponse:
        """Continues the same prompts with both versions and the same random numbers, and scores the continuations.

        A process of its own samples, so that what is served does not wait for it longer than for any other process.

        Raises:
            NotFound: the store does not hold a version.
            FailedPrecondition: this conductor has no torch, the run has no prompts to take, or the process failed.
            Unavailable: the process was killed, or the reward service does not answer.
        """
        if importlib.util.find_spec("torch") is None:
            raise FailedPrecondition(
                "this conductor has no torch to sample from versions that nobody serves: let it run from the learner's image "
                "(on a cluster, by a patch of the Deployment honed-conductor), or compare where the learner's package is"
            )
        left, right = (VersionId(v.fence, v.step) for v in (request.left, request.right))
        for version in (left, right):
            await asyncio.to_thread(self._store.manifest, version)
        prompts = list(request.prompts) or await asyncio.to_thread(self._prompts, request.samples or COMPARED)
        async with self._comparing:
            rows = await self._sampled(left, right, prompts)
        references = [prompt.reference for prompt in prompts]
        rewards = {side: await self._rewards(rows, references, side) for side in ("left", "right")}
        return conductor_pb2.CompareVersionsResponse(
            differences=differences(rows, rewards["left"], rewards["right"]),
            samples=[
                conductor_pb2.ComparedSample(
                    prompt=row["prompt"],
                    left=row["left"]["text"],
                    right=row["right"]["text"],
                    left_reward=rewards["left"][i],
                    right_reward=rewards["right"][i],
                )
                for i, row in enumerate(rows)
            ],
        )

    async def _sampled(
        self, left: VersionId, right: VersionId, prompts: Sequence[generation_pb2.Prompt]
    ) -> list[dict[str, Any]]:
        section = self._settings.conductor
        self._workspace.conductor.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="compare-", dir=self._workspace.conductor))
        try:
            task = {
                "store": self._settings.policy_url,
                "run": self._settings.run,
                "left": left.label,
                "right": right.label,
                "prompts": [_row(prompt) for prompt in prompts],
                "max_tokens": section.response_tokens,
                "temperature": section.temperature,
                "fixed_length": section.fixed_length,
                "seed": self._settings.seed,
                "dtype": self._settings.generation.dtype,
            }
            (directory / "task.json").write_text(json.dumps(task))
            spec = ProcessSpec("compare", (sys.executable, "-m", "honed.learner.jobs.compare", str(directory)), nice=10)
            await ProcessLauncher(self._workspace.logs, Limits(1)).run_job(spec, COMPARE_TIMEOUT_S)
            rows: list[dict[str, Any]] = json.loads((directory / "result.json").read_text())
            return rows
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def _rewards(self, rows: Sequence[Mapping[str, Any]], references: Sequence[str], side: str) -> list[float]:
        items = []
        for number, (row, reference) in enumerate(zip(rows, references, strict=True)):
            ids = generation_pb2.TokenIds(ids=row["prompt_token_ids"])
            prompt = generation_pb2.Prompt(token_ids=ids, reference=reference)
            item = reward_pb2.ScoreItem(id=str(number), prompt=prompt)
            if row[side]["token_ids"]:
                item.token_ids.ids.extend(row[side]["token_ids"])
            else:
                item.text = ""
            items.append(item)
        async with internal_channel(self._settings, self._fleet.target("reward")) as channel:
            try:
                return [result.reward for result in await scores(reward_pb2_grpc.RewardServiceStub(channel), items)]
            except grpc.aio.AioRpcError as error:
                raise Unavailable(f"the reward service did not score the samples: {error.details()}") from error

    async def _usable(self, version: common_pb2.PolicyVersion, what: str) -> VersionId:
        chosen = VersionId(version.fence, version.step)
        await asyncio.to_thread(self._store.manifest, chosen)
        mark = (await asyncio.to_thread(self._store.marks.all, "quarantined")).get(chosen)
        if mark is not None:
            raise FailedPrecondition(f"version {chosen} is quarantined ({mark.reason}), so it cannot be {what}: choose another")
        return chosen

    async def _until_served(self, stub: learner_pb2_grpc.LearnerServiceAsyncStub, version: VersionId) -> None:
        try:
            async with asyncio.timeout(self._settings.learner.push_timeout_s):
                while True:
                    status = await stub.GetStatus(learner_pb2.GetStatusRequest(), timeout=self._settings.learner.push_timeout_s)
                    if VersionId(status.served_version.fence, status.served_version.step) >= version:
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Unavailable(
                f"the learner went back, and no generator serves {version} yet: `honed status` shows its pushes"
            ) from None

    def _prompts(self, count: int) -> list[generation_pb2.Prompt]:
        data = self._settings.data
        path = data.evaluation.prompts or data.prompts
        if path is None:
            raise FailedPrecondition("the run has neither data.evaluation.prompts nor data.prompts: send prompts with the call")
        return prompts_of(path, count)

    def _list(self, start: int, count: int) -> tuple[list[conductor_pb2.VersionInfo], int]:
        versions = list(reversed(self._store.versions()))
        return [self._info(version) for version in versions[start : start + count]], len(versions)

    def _info(self, version: VersionId) -> conductor_pb2.VersionInfo:
        info = _described(self._store.manifest(version))
        for kind in ("promoted", "quarantined"):
            mark = self._store.marks.all(kind).get(version)
            if mark is not None:
                setattr(info, kind, True)
                info.reason = mark.reason
        return info


def differences(rows: Sequence[Mapping[str, Any]], left: Sequence[float], right: Sequence[float]) -> dict[str, float]:
    """The measures of the right version less those of the left one.

    Args:
        rows: of the comparing job; each side has `text`, `token_ids`, `logprobs` by its own version and `other_logprobs` by the
            other one, nats.
        left: rewards of the left side.
        right: rewards of the right side.

    Returns:
        `reward` with `reward_stderr` (of the mean of paired differences), `tokens` (mean length), `distinct2`, and `kl`: the
        mean over the right version's responses of log p(right) - log p(left), nats a response.
    """
    gains = [b - a for a, b in zip(left, right, strict=True)]
    spread = math.sqrt(sum((gain - mean(gains)) ** 2 for gain in gains) / (len(gains) - 1)) if len(gains) > 1 else 0.0

    def lengths(side: str) -> float:
        return mean([len(row[side]["token_ids"]) for row in rows])

    def distinct(side: str) -> float:
        return distinct_n([row[side]["text"].split() for row in rows])

    kl = mean([math.fsum(row["right"]["logprobs"]) - math.fsum(row["right"]["other_logprobs"]) for row in rows])
    return {
        "reward": mean(gains),
        "reward_stderr": spread / math.sqrt(len(gains)),
        "tokens": lengths("right") - lengths("left"),
        "distinct2": distinct("right") - distinct("left"),
        "kl": kl,
    }


def _row(prompt: generation_pb2.Prompt) -> dict[str, Any]:
    match prompt.WhichOneof("content"):
        case "token_ids":
            return {"token_ids": list(prompt.token_ids.ids)}
        case "messages":
            return {"messages": [{"role": m.role, "content": m.content} for m in prompt.messages.messages]}
        case _:
            return {"text": prompt.text}


def _of_learner(error: grpc.aio.AioRpcError) -> Exception:
    """The learner's refusal as this service's own."""
    details = error.details() or error.code().name
    if error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED):
        return FailedPrecondition(f"the learner cannot go back: {details}")
    if error.code() == grpc.StatusCode.ABORTED:
        return Aborted(f"the learner could not go back: {details}")
    return Unavailable(f"the learner does not answer: {details}")


def _message(run: str, version: VersionId) -> common_pb2.PolicyVersion:
    return common_pb2.PolicyVersion(run=run, fence=version.fence, step=version.step)


def _described(manifest: Manifest) -> conductor_pb2.VersionInfo:
    fields = asdict(manifest.lineage)
    created_at = fields.pop("created_at")
    known = common_pb2.Lineage.DESCRIPTOR.fields_by_name
    message = common_pb2.Lineage(**{name: value for name, value in fields.items() if name in known})
    if created_at:
        message.created_at.FromJsonString(created_at.replace("+00:00", "Z"))
    return conductor_pb2.VersionInfo(
        version=_message(manifest.run, manifest.version),
        lineage=message,
        bytes=manifest.total_bytes,
        manifest_sha256=manifest.digest,
    )
