"""Supervised fine-tuning: demonstrations in, the run's base model out. A part of the pretraining job, before version 0.0."""

from __future__ import annotations

from pathlib import Path

from honed.artifacts.files import hash_file
from honed.config import RunSettings
from honed.kit.errors import InvalidArgument
from honed.kit.progress import JobProgress, ProgressFile
from honed.learner.build import choose_device
from honed.learner.jobs.home import appearing, job_home, record_made_of, weights_of
from honed.learner.models.threads import use_threads
from honed.learner.sources.files import read_demonstrations
from honed.learner.sources.texts import demonstrations
from honed.learner.supervised.fit import Budget, Checkpoints, Fit, Standing
from honed.learner.supervised.language_model import language_model_trainer
from honed.learner.train import rng
from honed.learner.train.schedule import warmup_then_linear
from honed.models.facts import ModelFacts
from honed.models.loader import load_language_model
from honed.models.tokenizer import copy_tokenizer
from honed.workspace import Workspace

NAME = "fine-tuning"


def run(settings: RunSettings, source: Path, target: Path, progress: ProgressFile) -> None:
    """Trains the model of `source` on `data.demonstrations`, and leaves it in `target`.

    Raises:
        InvalidArgument: There are no demonstrations, or the model has no end-of-text token.
        ValueError: One cannot be used; names file and line.
        BadBatch: The loss is no longer finite.
    """
    section = settings.sft
    ModelFacts.read(source).check_length(settings.generation.max_model_tokens)
    made_of = {
        "demonstrations": [hash_file(path)[1] for path in settings.data.demonstrations],
        "sft": section.model_dump(mode="json", exclude={"threads", "microbatch_tokens", "device"}),
        "max_model_tokens": settings.generation.max_model_tokens,
        "weights": weights_of(source),
        "seed": settings.seed,
    }
    place = Workspace(settings.directory)
    record_made_of(place.base_made_of, made_of)
    with job_home(place.unfinished(NAME), made_of) as home:
        progress.report(JobProgress(0.0, "fine-tuning: reading demonstrations"), final=True)
        items = list(
            read_demonstrations(
                settings.data.demonstrations,
                source,
                longest=settings.generation.max_model_tokens,
                append_end=section.append_end,
                setting="sft.append_end",
            )
        )
        if not items:
            raise InvalidArgument("data.demonstrations", "the files hold none")
        batches = demonstrations(items, rows=section.batch, seed=settings.seed, epochs=section.epochs)
        model = load_language_model(source, device=choose_device(section.device, setting="sft.device"))
        use_threads(section.threads, model, beside=0)
        random = rng.generator(settings.seed)
        total = batches.batches * section.epochs

        def tell(at: Standing) -> None:
            progress.report(JobProgress(at.done, f"fine-tuning: step {at.step} of {total}", {"loss": at.loss}, "sft", at.step))

        Fit(
            language_model_trainer(model, section, rng=random, precision=section.precision),
            batches,
            Budget(total, lambda batch: 1, section.seconds),
            warmup_then_linear(section.learning_rate, warmup=section.warmup),
            checkpoints=Checkpoints(home / "checkpoints"),
            progress=tell,
        ).run()
        with appearing(target) as partial:
            model.save_pretrained(partial)
            copy_tokenizer(source, partial)
