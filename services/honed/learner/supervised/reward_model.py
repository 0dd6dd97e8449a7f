"""Trains a reward model from judgements: a language model's body, a linear head read at the last token, one epoch.

The recipe is that of lm-human-preferences (Ziegler et al. 2019): the head starts as N(0,
1/sqrt(d+1)), the learning rate falls linearly to 0, and gain and bias make the rewards of the
reference policy's samples mean 0, deviation 1, before and after. A text that occurs several times
in one batch passes through the model once: judgements that share texts and stand near each other
cost less. Texts pass in micro-batches of a token budget; the gradient is that of the whole batch
however it is cut. Nothing here reads a rating file: judgements come as token ids.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.learner.objectives.preference import best_of_k, ranked_pairs, scalar_rating
from honed.models.packing import pack
from honed.models.reward_model import RewardModel

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Ranking:
    """One judgement: responses to a prompt, best first. Two of them are a comparison.

    Attributes:
        prompt: its token ids with what the tokenizer puts in front of a text; that alone for texts
            that stand alone.
        responses: token ids of each response, without special tokens.
    """

    prompt: Tokens
    responses: tuple[Tokens, ...]

    def __post_init__(self) -> None:
        """Checks that there is something to compare."""
        if len(self.responses) < 2 or not all(self.prompt + response for response in self.responses):
            raise InvalidArgument("responses", "a ranking needs at least two responses, and each some token to read")


@dataclass(frozen=True)
class Rating:
    """One judgement: a response and the number that a person gave it."""

    prompt: Tokens
    response: Tokens
    value: float


Judgement = Ranking | Rating


@dataclass(frozen=True)
class RewardTrainingSettings:
    """How to train. Nothing has a default here: the run file's section is where defaults stand.

    Attributes:
        objective: how the responses of one ranking are compared: all pairs of it (InstructGPT), or
            the best against the rest (lm-human-preferences). The same for two responses. Ratings
            always have the squared error.
        batch_texts: an optimizer step takes judgements until they have this many different texts.
        microbatch_tokens: most tokens, padding included, of one pass. It bounds memory. A batch
            that needs more than one such pass is read twice, first for its scores and then,
            micro-batch by micro-batch, for the gradient.
        learning_rate: at its peak, after `warmup` (share of the training); it then falls linearly
            to 0.
        embedding_dropout: share of the embedding's components that are dropped in training; they
            are the model's only dropout.
        weight_decay: of matrices; gains of norms do not decay.
        gradient_norm: gradients are scaled down to this norm.
        max_seconds: training also stops after this time. The learning rate falls by whichever of
            epoch and time is nearer its end, so that a slow machine ends with a finished schedule
            too. None for a run that must repeat exactly.
    """

    objective: Literal["ranked_pairs", "best_of_k"]
    batch_texts: int
    microbatch_tokens: int
    learning_rate: float
    warmup: float
    embedding_dropout: float
    weight_decay: float
    gradient_norm: float
    max_seconds: float | None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise InvalidArgument("max_seconds", f"must be positive, got {self.max_seconds}")
        if self.batch_texts < 2:
            raise InvalidArgument("batch_texts", f"must be at least 2, got {self.batch_texts}")
        if not 0 < self.learning_rate < 1 or not 0 <= self.warmup < 1 or not 0 <= self.embedding_dropout < 1:
            raise InvalidArgument("learning_rate, warmup, embedding_dropout", "out of range")


@dataclass(frozen=True)
class RewardProgress:
    """Where the training stands after a step; `done` is the share of the epoch, 0 to 1."""

    step: int
    steps: int
    loss: float
    judgements: int
    done: float


@dataclass(frozen=True)
class RewardOutcome:
    """What came out: `loss` is the mean over the last tenth of the steps; `finished` is false when the time ran out."""

    steps: int
    judgements: int
    loss: float
    seconds: float
    finished: bool


@dataclass(frozen=True)
class JudgementBatch:
    """Judgements of one step and their different texts; `rankings` and `ratings` point into `sequences`."""

    sequences: tuple[Tokens, ...]
    rankings: tuple[tuple[int, ...], ...]
    ratings: tuple[tuple[int, float], ...]

    @property
    def judgements(self) -> int:
        """How many."""
        return len(self.rankings) + len(self.ratings)


def batch_judgements(judgements: Iterable[Judgement], *, texts: int) -> list[JudgementBatch]:
    """Cuts the judgements, in order, where a batch would get more than `texts` different texts.

    A judgement that has more texts than that makes a batch alone. Every judgement lands in exactly
    one batch.
    """
    batches: list[JudgementBatch] = []
    index: dict[Tokens, int] = {}
    rankings: list[tuple[int, ...]] = []
    ratings: list[tuple[int, float]] = []

    def close() -> None:
        if rankings or ratings:
            batches.append(JudgementBatch(tuple(index), tuple(rankings), tuple(ratings)))
            index.clear()
            rankings.clear()
            ratings.clear()

    for judgement in judgements:
        responses = judgement.responses if isinstance(judgement, Ranking) else (judgement.response,)
        sequences = [judgement.prompt + response for response in responses]
        if len(index.keys() | set(sequences)) > texts:
            close()
        places = tuple(index.setdefault(sequence, len(index)) for sequence in sequences)
        if isinstance(judgement, Ranking):
            rankings.append(places)
        else:
            ratings.append((places[0], judgement.value))
    close()
    return batches


def batch_loss(scores: Tensor, batch: JudgementBatch, objective: Literal["ranked_pairs", "best_of_k"]) -> Tensor:
    """Mean loss over the judgements of a batch, each with the same weight.

    Args:
        scores: `[len(batch.sequences)]`.
        batch: the judgements.
        objective: see `RewardTrainingSettings`.
    """
    total = scores.new_zeros(())
    for size in sorted({len(places) for places in batch.rankings}):
        ranked = scores[torch.tensor([places for places in batch.rankings if len(places) == size], device=scores.device)]
        if objective == "ranked_pairs":
            loss = ranked_pairs(ranked)
        else:
            loss = best_of_k(ranked, torch.zeros(len(ranked), dtype=torch.int64, device=scores.device))
        total = total + loss * len(ranked)
    if batch.ratings:
        rated = scores[torch.tensor([place for place, _ in batch.ratings], device=scores.device)]
        total = total + scalar_rating(rated, scores.new_tensor([value for _, value in batch.ratings])) * len(rated)
    return total / batch.judgements


def train_reward_model(
    model: RewardModel,
    judgements: Iterable[Judgement],
    settings: RewardTrainingSettings,
    *,
    rng: torch.Generator,
    prefix: Tokens = (),
    progress: Callable[[RewardProgress], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> RewardOutcome:
    """Trains `model` in place for one epoch. Batches keep the order inside, and come in an order drawn from `rng`.

    Args:
        model: as `RewardModel.from_language_model` made it.
        judgements: read once. Near ones that share texts make it faster.
        settings: rates and sizes.
        rng: of the order of batches and of dropout.
        prefix: what the tokenizer puts in front of a text; kept where a text is cut because the
            model cannot read it whole.
        progress: called after every step; raising from it ends the training.
        clock: seconds.

    Raises:
        InvalidArgument: when there are no judgements.
        FailedPrecondition: when the loss is no longer finite.
    """
    batches = batch_judgements(judgements, texts=settings.batch_texts)
    if not batches:
        raise InvalidArgument("judgements", "there are none to learn from")
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
    started, seen, losses = clock(), 0, list[float]()
    for step, chosen in enumerate(torch.randperm(len(batches), generator=rng).tolist()):
        done = max(step / len(batches), (clock() - started) / settings.max_seconds if settings.max_seconds else 0.0)
        if done >= 1.0:
            break
        _set_rate(optimizer, settings, done)
        batch = batches[chosen]
        loss = _accumulate_gradients(model, batch, settings, rng, prefix)
        torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        seen += batch.judgements
        if not math.isfinite(losses[-1]):
            raise FailedPrecondition(f"the loss is {losses[-1]} at step {step + 1}; lower the learning rate")
        progress(RewardProgress(step + 1, len(batches), losses[-1], seen, min(1.0, max(done, (step + 1) / len(batches)))))
    last = losses[-max(1, len(losses) // 10) :]
    mean = sum(last) / len(last) if last else math.nan
    return RewardOutcome(len(losses), seen, mean, clock() - started, len(losses) == len(batches))


def _accumulate_gradients(
    model: RewardModel, batch: JudgementBatch, settings: RewardTrainingSettings, rng: torch.Generator, prefix: Tokens
) -> float:
    """Adds the gradient of the batch's loss to the parameters; returns the loss.

    A loss over rankings needs the scores of texts from several micro-batches at once. So where the
    batch does not fit in one budget, its scores are made without gradient, the loss is
    differentiated by the scores alone, and each micro-batch is read again with the gradient of its
    own scores (as GradCache: Gao et al. 2021). Both readings drop the same components.
    """
    texts = [model.fitted(sequence, prefix)[0] for sequence in batch.sequences]
    groups = pack([len(ids) for ids in texts], settings.microbatch_tokens)
    at_once = sum(len(group) * len(texts[group[-1]]) for group in groups) <= settings.microbatch_tokens

    def read(group: Sequence[int]) -> Tensor:
        return model.raw_scores([texts[place] for place in group], dropout=settings.embedding_dropout, rng=rng)

    order = torch.tensor([place for group in groups for place in group], device=model.device).argsort()
    if at_once:
        loss = batch_loss(torch.cat([read(group) for group in groups])[order], batch, settings.objective)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())
    dropped: list[Tensor] = []
    parts: list[Tensor] = []
    with torch.no_grad():
        for group in groups:
            dropped.append(rng.get_state())
            parts.append(read(group))
    after = rng.get_state()
    scores = torch.cat(parts)[order].requires_grad_()
    loss = batch_loss(scores, batch, settings.objective)
    (to_scores,) = torch.autograd.grad(loss, [scores])
    for group, state in zip(groups, dropped, strict=True):
        rng.set_state(state)
        read(group).backward(to_scores[torch.tensor(group, device=model.device)])  # type: ignore[no-untyped-call]
    rng.set_state(after)
    return float(loss.detach())


def accuracy(model: RewardModel, comparisons: Sequence[Ranking], prefix: Tokens = ()) -> float:
    """The share of comparisons whose first response has the higher score than the second; equal scores count one half."""
    if not comparisons:
        raise InvalidArgument("comparisons", "there are none to agree with")
    pairs = [(item.prompt + item.responses[0], item.prompt + item.responses[1]) for item in comparisons]
    index = {sequence: place for place, sequence in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
    scores = model.rewards([model.fitted(sequence, prefix)[0] for sequence in index])
    margins = torch.tensor([scores[index[better]] - scores[index[worse]] for better, worse in pairs])
    return float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean())


def _set_rate(optimizer: torch.optim.Optimizer, settings: RewardTrainingSettings, done: float) -> None:
    # The first step has a small rate, not none.
    warmup = min(1.0, (done + 0.002) / (settings.warmup + 0.002))
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * warmup * (1.0 - done)
