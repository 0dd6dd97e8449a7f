"""The reward-model job: judgements from the preference service in, `models/reward` out."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import AsyncIterable, AsyncIterator

import torch

from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition
from honed.kit.jsonl import read_lines
from honed.kit.progress import JobProgress, ProgressFile
from honed.kit.wiring import internal_channel
from honed.learner import rng
from honed.learner.build import choose_device
from honed.learner.jobs.samples import sample_reference
from honed.learner.reward_training import (
    Judgement,
    Ranking,
    Rating,
    RewardProgress,
    RewardTrainingSettings,
    train_reward_model,
)
from honed.models.reward_model import RewardModel
from honed.models.tokenizer import TextTokenizer, load_tokenizer
from honed.v1 import preference_pb2, preference_pb2_grpc
from honed.workspace import Workspace

NAME = "reward-model"


async def run(settings: RunSettings) -> None:
    """Makes `models/reward`, unless it is there.

    Raises:
        FailedPrecondition: the preference service holds no judgements to learn from.
        AioRpcError: the preference service does not answer.
    """
    place, mine = Workspace(settings.directory), settings.reward_training
    progress = ProgressFile(place.progress / f"{NAME}.json")
    if not place.reward_model.exists():
        torch.set_num_threads(mine.threads)
        tokenizer = load_tokenizer(place.base_model)
        progress.report(JobProgress(0.0, "judgements from the preference service"), final=True)
        digest, judgements = await _exported(settings, tokenizer)
        chance = rng.generator(settings.seed)
        model = RewardModel.from_language_model(
            place.base_model,
            rng=chance,
            layers=mine.layers,
            device=choose_device(mine.device, setting="reward_training.device"),
            precision=mine.precision,
        )
        samples = [model.fitted(ids, tokenizer.prefix)[0] for ids in _reference_samples(settings, place, tokenizer, chance)]
        # So that the penalty for leaving the reference keeps its meaning: reward gain and bias are set on the reference
        # policy's own samples, before and after (lm-human-preferences).
        model.normalise(samples)
        model.fold_gain()

        def tell(at: RewardProgress) -> None:
            figures = {"loss": at.loss, "judgements": float(at.judgements)}
            progress.report(JobProgress(at.done, f"step {at.step} of {at.steps}", figures))

        train_reward_model(
            model,
            judgements,
            RewardTrainingSettings(
                objective=mine.objective,
                batch_texts=mine.batch_texts,
                microbatch_tokens=mine.microbatch_tokens,
                learning_rate=mine.learning_rate,
                warmup=mine.warmup,
                embedding_dropout=mine.embedding_dropout,
                weight_decay=mine.weight_decay,
                gradient_norm=mine.gradient_norm,
                max_seconds=mine.seconds,
            ),
            rng=chance,
            prefix=tokenizer.prefix,
            progress=tell,
        )
        model.normalise(samples)
        partial = place.reward_model.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save(partial, place.base_model)
        place.reward_snapshot.write_text(digest + "\n")
        os.replace(partial, place.reward_model)
    progress.report(JobProgress(1.0, "the reward model is trained"), final=True)


def _reference_samples(
    settings: RunSettings, place: Workspace, tokenizer: TextTokenizer, chance: torch.Generator
) -> list[list[int]]:
    """Samples of the reference policy, as the scorer will see those of the policy."""
    if settings.data.prompts is None:
        raise FailedPrecondition("data.prompts is not set: the reward's gain and bias are set on samples of the policy")
    rows = itertools.islice((row for _, row in read_lines(settings.data.prompts)), settings.reward_training.normalising_samples)
    prompts = [row.get("token_ids") or tokenizer.encode(row["text"], special_tokens=True) for row in rows]
    mine = settings.conductor
    pairs = sample_reference(place.base_model, prompts, mine.response_tokens, temperature=mine.temperature, rng=chance)
    whole = any(s.sees_prompt for s in settings.reward.scorers if s.source == str(place.reward_model))
    return [prompt + response if whole else [*tokenizer.prefix, *response] for prompt, response in pairs]


async def _exported(settings: RunSettings, tokenizer: TextTokenizer) -> tuple[str, list[Judgement]]:
    """A snapshot's content hash, and its judgements as token ids, in the order in which they were recorded."""
    async with internal_channel(settings, settings.preference.target) as channel:
        stub = preference_pb2_grpc.PreferenceServiceStub(channel)
        snapshot = await stub.CreateSnapshot(
            preference_pb2.CreateSnapshotRequest(idempotency_key=f"{settings.run}/reward-model"), timeout=60
        )
        request = preference_pb2.ExportJudgementsRequest(snapshot_id=snapshot.snapshot_id)
        rows = [row async for row in _texts(stub.ExportJudgements(request, timeout=600))]
    if not rows:
        raise FailedPrecondition(
            "the preference service holds no comparison, ranking or rating: import some by `honed judge import`"
        )
    encoded = iter(tokenizer.encode_all([text for _, texts, _ in rows for text in texts]))
    # As the scorer reads them: a text that stands alone begins with what the tokenizer puts in front of every text.
    prompts = {
        prompt: tuple(tokenizer.encode(prompt, special_tokens=True)) if prompt else tokenizer.prefix
        for prompt in {row[0] for row in rows}
    }
    judgements: list[Judgement] = []
    for prompt, texts, value in rows:
        responses = tuple(tuple(next(encoded)) for _ in texts)
        head = prompts[prompt]
        judgements.append(Ranking(head, responses) if value is None else Rating(head, responses[0], value))
    return snapshot.content_sha256, judgements


async def _texts(
    stream: AsyncIterable[preference_pb2.ExportJudgementsResponse],
) -> AsyncIterator[tuple[str, list[str], float | None]]:
    """Yields (prompt, responses best first, None) for comparisons and rankings, (prompt, [response], value) for ratings.

    Ties say nothing of an order and are left out, as InstructGPT leaves them out.
    """
    async for message in stream:
        judgement = message.judgement
        texts = [response.text for response in judgement.responses]
        match judgement.WhichOneof("verdict"):
            case "pairwise" if not judgement.pairwise.tie:
                yield judgement.prompt, [texts[judgement.pairwise.preferred], texts[judgement.pairwise.other]], None
            case "ranking" if len(set(judgement.ranking.ranks)) == len(texts):
                order = sorted(range(len(texts)), key=lambda i, ranks=judgement.ranking.ranks: ranks[i])  # type: ignore[misc]
                yield judgement.prompt, [texts[i] for i in order], None
            case "rating":
                rating = judgement.rating
                yield judgement.prompt, [texts[rating.response]], (rating.value - rating.low) / (rating.high - rating.low)
