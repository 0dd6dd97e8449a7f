"""The pretraining job: texts in, the run's base model out, published as version 0.0 of the policy."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from honed.artifacts.draft import VersionDraft
from honed.artifacts.files import hash_file
from honed.artifacts.manifest import Lineage
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.kit.errors import InvalidArgument
from honed.kit.progress import JobProgress, ProgressFile
from honed.learner.jobs import fine_tuning
from honed.learner.jobs.home import appearing, job_home, made_of_digest, record_made_of, weights_of
from honed.learner.jobs.reuse import Shelf
from honed.learner.loop.exporter import Exporter
from honed.learner.models.policy import TokenModel
from honed.learner.models.threads import use_threads
from honed.learner.sources.files import read_texts
from honed.learner.sources.texts import packed_texts
from honed.learner.supervised.fit import Checkpoints, Fit, Standing
from honed.learner.supervised.language_model import (
    ModelShape,
    language_model_rate,
    language_model_trainer,
    new_language_model,
    save_language_model,
    token_budget,
)
from honed.learner.train import rng
from honed.models.facts import ModelFacts
from honed.models.loader import load_language_model
from honed.models.new_tokenizer import END_OF_TEXT_ID, train_tokenizer
from honed.models.tokenizer import TextTokenizer
from honed.workspace import Workspace

NAME = "pretrain"


def run(settings: RunSettings) -> None:
    """Makes `models/base` and version 0.0, unless both are there.

    The base is the model of `conductor.start_from`, or one that is pretrained on `data.texts`; fine-tuned on
    `data.demonstrations` if there are any.

    Raises:
        InvalidArgument: there are no texts, or `start_from` holds no model.
        StoreFull: the policy store has no room.
    """
    place = Workspace(settings.directory)
    progress = ProgressFile(place.progress / f"{NAME}.json")
    if not place.base_model.exists():
        fine_tunes = settings.goes_through("sft")
        first = place.first_model if fine_tunes else place.base_model
        if not first.exists():
            if settings.conductor.start_from is None:
                _pretrain(settings, place, first, progress)
            else:
                _copy(settings.conductor.start_from, place, first)
        if fine_tunes:
            fine_tuning.run(settings, first, place.base_model, progress)
    publish_base(settings, place)
    progress.report(JobProgress(1.0, "the base model is published as version 0.0"), final=True)


def publish_base(settings: RunSettings, place: Workspace) -> None:
    """Publishes `models/base` as version 0.0; does nothing if it stands in the store."""
    store = PolicyStore(settings.policy_url, settings.run)
    version = VersionId(0, 0)
    if version in store.versions():
        return
    ModelFacts.read(place.base_model).check_length(settings.generation.max_model_tokens)
    policy = TokenModel(load_language_model(place.base_model))
    exporter = Exporter(policy, place.base_model, place.root / "models" / "export", dtype=settings.generation.weights_dtype)
    directory, canaries = exporter.export(version)
    config_hash = made_of_digest(place.base_made_of, lambda: _started_from(place.base_model))
    lineage = Lineage(config_hash=config_hash, created_at=datetime.now(tz=UTC).isoformat())
    store.publish(directory, VersionDraft(version, canaries, lineage))
    shutil.rmtree(directory)


def _pretrain(settings: RunSettings, place: Workspace, target: Path, progress: ProgressFile) -> None:
    section = settings.pretrain
    if not settings.data.texts:
        raise InvalidArgument(
            "data.texts", "there are no texts to learn a language from: name some, or set conductor.start_from"
        )
    made_of = {
        "texts": [hash_file(path)[1] for path in settings.data.texts],
        "pretrain": section.model_dump(mode="json", exclude={"threads", "microbatch_tokens"}),
        "max_model_tokens": settings.generation.max_model_tokens,
        "seed": settings.seed,
    }
    # Of a base that is fine-tuned from this, fine-tuning records another, with the digests of these weights in it.
    record_made_of(place.base_made_of, made_of)
    shelf = Shelf(settings, NAME, made_of)
    if (reused := shelf.take(target)) is not None:
        progress.report(JobProgress(1.0, f"the model that the run {reused.run} has trained of the same"), final=True)
        return
    with job_home(place.unfinished(NAME), made_of) as home:
        texts = read_texts(settings.data.texts)
        progress.report(JobProgress(0.0, f"tokenizer of {len(texts)} texts"), final=True)
        longest = settings.generation.max_model_tokens
        tokenizer = train_tokenizer(texts, vocabulary_size=section.vocabulary, max_length=longest)
        random = rng.generator(settings.seed)
        shape = ModelShape(section.hidden_size, section.layers, section.head_size, longest)
        model = new_language_model(shape, vocabulary_size=len(tokenizer), rng=random)
        use_threads(section.threads, model, beside=0)
        source = packed_texts(
            TextTokenizer(tokenizer).encode_all(texts),
            separator=END_OF_TEXT_ID,
            width=section.block_tokens,
            rows=section.block_rows,
            seed=settings.seed,
        )
        trainer = language_model_trainer(model, section, rng=random)

        def tell(at: Standing) -> None:
            figures = {"loss": at.loss, "tokens_per_second": at.per_second, "tokens": float(at.amount)}
            progress.report(JobProgress(at.done, f"step {at.step}", figures, "pretrain", at.step))

        checkpoints = Checkpoints(home / "checkpoints")
        Fit(trainer, source, token_budget(section), language_model_rate(section), checkpoints=checkpoints, progress=tell).run()
        with appearing(target) as partial:
            save_language_model(model, tokenizer, partial)
    shelf.keep(target)


def _started_from(model: Path) -> dict[str, Any]:
    return {"start_from": weights_of(model)}


def _copy(source: str, place: Workspace, target: Path) -> None:
    record_made_of(place.base_made_of, _started_from(Path(source)))
    with appearing(target) as partial:
        try:
            shutil.copytree(source, partial)
        except OSError as error:
            raise InvalidArgument("conductor.start_from", f"{source} cannot be copied: {error}") from error
