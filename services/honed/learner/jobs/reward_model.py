"""The reward-model job: judgements of the preference service in, the next version of the reward model `trained` out.

Each time it trains it freezes a new snapshot of the judgements. If the newest version was made from the
same judgements, base and settings, nothing is trained: the phase of a run may be entered any number of
times, and running the job again refreshes the reward model if people have said more.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from honed.artifacts.files import hash_file
from honed.artifacts.manifest import Lineage, Manifest
from honed.artifacts.names import MANIFEST_NAME
from honed.artifacts.promotions import PromotionRecord
from honed.artifacts.reward_models import TRAINED, RewardModelStore
from honed.artifacts.store import PolicyStore
from honed.config import RunSettings
from honed.formats.files import Defaults, read_judgements
from honed.kit.cores import available_cores
from honed.kit.errors import FailedPrecondition, root_cause
from honed.kit.progress import JobProgress, ProgressFile
from honed.learner.build import choose_device
from honed.learner.data.judged import Judged, encode, read_judgement, read_pairs, weighed
from honed.learner.data.judgement import Judgement, Ranking
from honed.learner.jobs.home import job_home
from honed.learner.jobs.reuse import Shelf
from honed.learner.jobs.samples import BASE, as_scored, reference_samples
from honed.learner.models.adapters import adapted
from honed.learner.models.threads import beside_generation, use_threads
from honed.learner.supervised.fit import Budget, Checkpoints, Fit, Standing
from honed.learner.supervised.head import train_head
from honed.learner.supervised.judgements import accuracy, judgement_batches, reward_rate, reward_trainer
from honed.learner.train import rng
from honed.models.pooling import Pooling
from honed.models.reward_model import RewardModel, reward_model_version
from honed.models.tokenizer import TextTokenizer, load_tokenizer
from honed.runtime import internal_channel
from honed.v1 import preference_pb2, preference_pb2_grpc
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

NAME = "reward-model"
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class _Snapshot:
    """Frozen judgements, in the order in which they were recorded."""

    snapshot_id: str
    sha256: str


async def run(settings: RunSettings) -> None:
    """Publishes the next version of `trained`, unless the newest one is of the same judgements and settings.

    Raises:
        FailedPrecondition: The preference service holds no judgements to learn from, or the run has no prompts.
        NotFound: The run has no base version yet.
        AioRpcError: The preference service does not answer.
    """
    progress = ProgressFile(Workspace(settings.directory).progress / f"{NAME}.json")
    progress.report(JobProgress(0.0, "judgements from the preference service"), final=True)
    store = RewardModelStore(settings.policy_url, settings.run, TRAINED)
    base = await asyncio.to_thread(PolicyStore(settings.policy_url, settings.run).manifest, BASE)
    digest = await asyncio.to_thread(_settings_digest, settings, base)
    async with internal_channel(settings, settings.preference.target) as channel:
        stub = preference_pb2_grpc.PreferenceServiceStub(channel)
        with job_home(Workspace(settings.directory).unfinished(NAME), {"settings": digest}) as home:
            snapshot = await _freeze(stub, settings.run, home)
            manifest = await asyncio.to_thread(_newest, store)
            made_of = (snapshot.sha256, digest)
            if manifest is None or (manifest.lineage.preference_snapshot, manifest.lineage.config_hash) != made_of:
                manifest = await _Training(settings, store, progress, home).run(stub, snapshot, digest)
    label = f"reward model {TRAINED}/{manifest.version}"
    progress.report(JobProgress(1.0, label, dict(manifest.lineage.figures)), final=True)


def _newest(store: RewardModelStore) -> Manifest | None:
    version = store.latest()
    return None if version is None else store.manifest(version)


async def _freeze(stub: preference_pb2_grpc.PreferenceServiceAsyncStub, run: str, home: Path) -> _Snapshot:
    """The judgements of now, or of then if a training of those was interrupted: a key that was used gives those again."""
    key = await asyncio.to_thread(_key, home, run)
    request = preference_pb2.CreateSnapshotRequest(idempotency_key=key)
    answer = await stub.CreateSnapshot(request, timeout=60)
    return _Snapshot(answer.snapshot_id, answer.content_sha256)


def _key(home: Path, run: str) -> str:
    kept = home / "snapshot-key"
    if not any(home.glob(f"{_CHECKPOINTS}*")):
        kept.write_text(f"{run}/{NAME}/{uuid.uuid4().hex}", encoding="utf-8")
    return kept.read_text(encoding="utf-8")


def _settings_digest(settings: RunSettings, base: Manifest) -> str:
    """Digest of the models and the settings that decide what a reward model learns."""
    tree = {"base": base.digest, **_deciding(settings)}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _deciding(settings: RunSettings) -> dict[str, Any]:
    """What decides, beside the base and the judgements, what a reward model learns: settings, and the model to start from."""
    start_from = settings.reward_training.start_from
    return {
        **({} if start_from is None else {"body": reward_model_version(Path(start_from))}),
        "seed": settings.seed,
        "reward_training": settings.reward_training.model_dump(mode="json", exclude={"threads", "device", "microbatch_tokens"}),
        "sampling": settings.conductor.model_dump(mode="json", include={"temperature", "response_tokens", "fixed_length"}),
        "truncate": settings.reward.truncate.model_dump(mode="json") if settings.reward.truncate else None,
        "sees_prompt": _sees_prompt(settings),
    }


def _sees_prompt(settings: RunSettings) -> bool:
    return any(scorer.sees_prompt for scorer in settings.reward.scorers if scorer.source == TRAINED)


class _Training:
    """One training, from the snapshot to the published version."""

    def __init__(self, settings: RunSettings, store: RewardModelStore, progress: ProgressFile, home: Path) -> None:
        self._settings, self._store, self._progress, self._directory = settings, store, progress, home
        self._generator = rng.generator(settings.seed)
        self._model = home / "model"

    async def run(
        self, stub: preference_pb2_grpc.PreferenceServiceAsyncStub, snapshot: _Snapshot, settings_digest: str
    ) -> Manifest:
        """Trains, measures and publishes."""
        settings = self._settings
        # For the samples; the training, which knows its model, chooses for itself.
        torch.set_num_threads(settings.reward_training.threads or max(1, available_cores() - beside_generation(settings)))
        policies = PolicyStore(settings.policy_url, settings.run)
        base = await asyncio.to_thread(policies.fetch, BASE, Workspace(settings.directory).jobs / NAME)
        body = base if settings.reward_training.start_from is None else Path(settings.reward_training.start_from)
        policy_tokenizer, tokenizer = load_tokenizer(base), load_tokenizer(body)
        try:
            async with asyncio.TaskGroup() as group:  # the generation service may still be starting
                sampling = group.create_task(
                    reference_samples(settings, base, policy_tokenizer, rng=self._generator, report=self._waits_for)
                )
                exporting = group.create_task(self._exported(stub, snapshot, tokenizer))
        except ExceptionGroup as failed:
            raise root_cause(failed) from failed
        samples = as_scored(sampling.result(), policy_tokenizer, tokenizer, sees_prompt=_sees_prompt(settings))
        judgements, left_out = exporting.result()
        made_of = await asyncio.to_thread(self._made_of, base, judgements)
        figures = await asyncio.to_thread(self._make, body, tokenizer, judgements, samples, made_of)
        if left_out:
            figures = {**figures, "left_out": float(left_out)}
        return await asyncio.to_thread(self._publish, snapshot, settings_digest, figures)

    def _make(
        self,
        body: Path,
        tokenizer: TextTokenizer,
        judgements: list[Judgement],
        samples: list[list[int]],
        made_of: Mapping[str, Any],
    ) -> Mapping[str, float]:
        """Trains and measures the model, or takes the one that was made of the same; it is in `self._model` then."""
        shutil.rmtree(self._model, ignore_errors=True)
        shelf = Shelf(self._settings, NAME, made_of)
        if (reused := shelf.take(self._model)) is not None:
            return reused.figures
        held_out = self._held_out(tokenizer)  # before the training: what is wrong with the file must not cost the model
        model = self._trained(body, tokenizer, judgements, samples)
        figures = {"judgements": float(len(judgements)), **self._agreement(model, tokenizer, held_out)}
        model.save(self._model, body)
        shelf.keep(self._model, figures)
        return figures

    def _made_of(self, base: Path, judgements: list[Judgement]) -> dict[str, Any]:
        """All that decides the model and its figures; of what the reference policy says, the prompts."""
        data = self._settings.data
        files = [data.prompts, data.evaluation.judgements.file if data.evaluation.judgements else None]
        return {
            "base": {path.name: hash_file(path)[1] for path in sorted(base.iterdir()) if path.name != MANIFEST_NAME},
            "judgements": _digest(judgements),
            "files": [hash_file(path)[1] for path in files if path is not None],
            **_deciding(self._settings),
        }

    def _waits_for(self, what: str) -> None:
        self._progress.report(JobProgress(0.0, what), final=True)

    async def _exported(
        self, stub: preference_pb2_grpc.PreferenceServiceAsyncStub, snapshot: _Snapshot, tokenizer: TextTokenizer
    ) -> tuple[list[Judgement], int]:
        """What the snapshot says, as token ids, and how many of its judgements cannot be read."""
        request = preference_pb2.ExportJudgementsRequest(snapshot_id=snapshot.snapshot_id)
        stream = stub.ExportJudgements(request, timeout=600)
        section = self._settings.reward_training
        exported = [message.judgement async for message in stream]
        rows = list(weighed(exported, section))
        if not rows and any(read_judgement(judgement) is not None for judgement in exported):
            raise FailedPrecondition(
                "reward_training.annotator_weights, source_weights and objective leave no judgement: give somebody who judged "
                "a weight, or learn from ranked_pairs, which needs neither a single best response nor how much better it is"
            )
        if not rows:
            raise FailedPrecondition(
                "the preference service holds no comparison, ranking or rating: import some by `honed judge import`, or name "
                "files in data.judgements"
            )
        judgements, left_out = await asyncio.to_thread(self._encoded, tokenizer, rows)
        if not judgements:
            raise FailedPrecondition(
                "no judgement has a text that the reward model could read: responses are empty, and without a prompt, or with "
                "sees_prompt: false, nothing stands before them"
            )
        return judgements, left_out

    def _encoded(self, tokenizer: TextTokenizer, rows: Sequence[Judged]) -> tuple[list[Judgement], int]:
        """Judgements that a reward model can read, and how many it cannot."""
        margin = self._settings.reward_training.margin
        judgements, left = encode(tokenizer, rows, sees_prompt=_sees_prompt(self._settings), margin=margin)
        for reason, count in left.items():
            logger.warning("judgements left out", extra={"reason": reason, "judgements": count})
        return judgements, sum(left.values())

    def _trained(
        self, body: Path, tokenizer: TextTokenizer, judgements: list[Judgement], samples: list[list[int]]
    ) -> RewardModel:
        section = self._settings.reward_training
        model = RewardModel.from_language_model(
            body,
            rng=self._generator,
            layers=section.layers,
            device=choose_device(section.device, setting="reward_training.device"),
            precision=section.precision,
            pooling=Pooling(section.read, section.read_layers),
        )
        use_threads(section.threads, model.classifier, beside_generation(self._settings))
        samples = [model.fitted(ids, tokenizer.prefix)[0] for ids in samples]
        # Judgements that somebody has erased meanwhile are not gone on with: what is left of them has another digest.
        kept = self._directory / f"{_CHECKPOINTS}-{_digest(judgements)}"
        if section.train == "head":
            train_head(model, judgements, section, kept, prefix=tokenizer.prefix, report=self._reports)
        else:
            self._train_in_steps(model, tokenizer, judgements, samples, kept)
        # So that the penalty for leaving the reference keeps its meaning: gain and bias are set on the reference policy's own
        # samples (lm-human-preferences).
        model.normalise(samples)
        return model

    def _reports(self, done: float, doing: str) -> None:
        self._progress.report(JobProgress(done, doing))

    def _train_in_steps(
        self,
        model: RewardModel,
        tokenizer: TextTokenizer,
        judgements: list[Judgement],
        samples: list[list[int]],
        kept: Path,
    ) -> None:
        section = self._settings.reward_training
        model.normalise(samples)  # before, too: rewards of deviation 1 are where the learning rate begins
        model.fold_gain()
        source = judgement_batches(judgements, section, seed=self._settings.seed)

        def report(at: Standing) -> None:
            self._progress.report(
                JobProgress(at.done, f"step {at.step} of {source.batches}", {"loss": at.loss}, "reward_model", at.step)
            )

        rank, alpha = section.adapter_rank, section.adapter_alpha
        with (
            adapted(model.classifier, model.classifier.score, rank=rank, alpha=alpha, rng=self._generator)
            if section.train == "adapters"
            else nullcontext()
        ):
            Fit(
                reward_trainer(model, section, rng=self._generator, prefix=tokenizer.prefix),
                source,
                Budget(source.batches, lambda batch: 1, section.seconds),
                reward_rate(section),
                checkpoints=Checkpoints(kept),
                progress=report,
            ).run()

    def _held_out(self, tokenizer: TextTokenizer) -> list[Ranking]:
        """Pairs of which people preferred one, that nothing trains on; none without data.

        Raises:
            BadLine: The file has a broken line.
            NotFound: It is not there.
        """
        source = self._settings.data.evaluation.judgements
        if source is None:
            return []
        entries = read_judgements(source.file, source.format, Defaults(source.source, source.annotator))
        pairs = [pair for entry in entries for pair in read_pairs(entry.judgement)]
        rankings = [row for row in self._encoded(tokenizer, pairs)[0] if isinstance(row, Ranking)]
        if not rankings:
            logger.warning("no held-out judgement orders two responses", extra={"file": str(source.file)})
        return rankings

    def _agreement(self, model: RewardModel, tokenizer: TextTokenizer, held_out: list[Ranking]) -> dict[str, float]:
        """The share of held-out pairs that the model orders as people did, and how many pairs there are; none without them."""
        if not held_out:
            return {}
        self._progress.report(JobProgress(1.0, "agreement with held-out judgements"), final=True)
        return {"agreement": accuracy(model, held_out, tokenizer.prefix), "held_out": float(len(held_out))}

    def _publish(self, snapshot: _Snapshot, settings_digest: str, figures: Mapping[str, float]) -> Manifest:
        settings, directory = self._settings, self._model
        lineage = Lineage(
            parent=BASE.label,
            config_hash=settings_digest,
            reward_model_version=reward_model_version(directory),
            preference_snapshot=snapshot.sha256,
            created_at=datetime.now(tz=UTC).isoformat(),
            figures=figures,
        )
        manifest = self._store.publish_next(directory, lineage)
        promoted = PromotionRecord(settings.policy_url, settings.run).read().by_scorer.values()
        named = [source for scorer in settings.reward.scorers for _, source in scorer.models]
        self._store.retire(settings.policy.keep, [*named, *(row.source for row in promoted)])
        shutil.rmtree(directory)
        return manifest


def _digest(judgements: Sequence[Judgement]) -> str:
    digest = hashlib.sha256()
    for judgement in judgements:
        digest.update(repr(judgement).encode())
    return digest.hexdigest()[:16]
