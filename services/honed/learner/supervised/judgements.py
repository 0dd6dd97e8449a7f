"""Trains a reward model from judgements: a language model's body, a linear head read at the last token.

The recipe is that of lm-human-preferences (Ziegler et al. 2019): the head starts as N(0,
1/sqrt(d+1)), the learning rate falls linearly to 0, and gain and bias make the rewards of the
reference policy's samples mean 0, deviation 1, before and after. A text that occurs several times
in one batch passes through the model once: judgements that share texts and stand near each other
cost less. Nothing here reads a rating file: judgements come as token ids. The head alone
is trained by `supervised.head`; adapters of the body are put on, and taken off, by who calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from honed.kit.errors import InvalidArgument
from honed.learner.data.judgement import Judgement, Ranking, SharedTexts, Tokens, batch_judgements
from honed.learner.models.trained import Trained
from honed.learner.settings import RewardTrainingSettings
from honed.learner.sources.epochs import Epochs
from honed.learner.supervised.loss import SummedLoss
from honed.learner.train.algorithm import State, UpdateContext
from honed.learner.train.optimizer import decayed_matrices
from honed.learner.train.schedule import Rate, warmup_then_linear
from honed.learner.train.trainer import Trainer, TrainSettings
from honed.models.packing import pack
from honed.models.reward_model import RewardModel

Batch = Sequence[Judgement]


class TrainedReward(Trained):
    """A reward model that a trainer moves."""

    def __init__(self, model: RewardModel) -> None:
        """Takes note of its weights."""
        super().__init__()
        self.classifier = model.classifier

    @property
    def published(self) -> nn.Module:
        """All of it."""
        module: nn.Module = self.classifier
        return module


class FromJudgements:
    """The algorithm. Implements `Algorithm`.

    A loss over rankings needs the scores of texts that may be in several micro-batches. So where a batch does not fit in one,
    its scores are made without gradient, the loss is differentiated by the scores alone, and each micro-batch is read again
    with the gradient of its own scores (as GradCache: Gao et al. 2021). Both readings drop the same components.
    """

    def __init__(self, model: RewardModel, section: RewardTrainingSettings, *, rng: torch.Generator, prefix: Tokens) -> None:
        """Trains nothing by itself.

        Args:
            model: As `RewardModel.from_language_model` made it.
            section: The objective and the dropout of the embedding.
            rng: Of the dropout; the trainer's, so that a checkpoint knows its state.
            prefix: What the tokenizer puts in front of a text; kept where a text is cut because the model cannot read it whole.
        """
        self.model, self._section, self._rng, self._prefix = model, section, rng, prefix

    def prepare(self, batch: Batch, context: UpdateContext) -> _Batch:
        """See `Algorithm`."""
        return _Batch(self, batch, context)

    def state(self) -> State:
        """Nothing."""
        return {}

    def load_state(self, state: State) -> None:
        """Nothing."""

    def fitted(self, text: Tokens) -> list[int]:
        """As much of a text as the model can read."""
        return self.model.fitted(text, self._prefix)[0]

    def read(self, texts: Sequence[Sequence[int]], state: Tensor | None = None) -> Tensor:
        """The scores of texts in one pass; with the dropout of `state`, after which the generator goes on where it was."""
        after = self._rng.get_state() if state is not None else None
        if state is not None:
            self._rng.set_state(state)
        scores = self.model.raw_scores(texts, dropout=self._section.embedding_dropout, rng=self._rng)
        if after is not None:
            self._rng.set_state(after)
        return scores

    def dropout_state(self) -> Tensor:
        """To read a micro-batch again."""
        return self._rng.get_state()

    def loss(self, shared: SharedTexts) -> SummedLoss:
        """The sum of losses over judgements."""
        return SummedLoss(shared, self._section.objective, self.model.device)


class _Batch:
    """Implements `Prepared`."""

    def __init__(self, algorithm: FromJudgements, judgements: Batch, context: UpdateContext) -> None:
        self._algorithm, self._judgements, self._context = algorithm, judgements, context
        self.loss = 0.0

    def __len__(self) -> int:
        """Its judgements."""
        return len(self._judgements)

    def minibatch(self, chosen: Sequence[int]) -> _Minibatch:
        """See `Prepared`."""
        judgements = [self._judgements[place] for place in sorted(chosen)]
        return _Minibatch(self._algorithm, self, judgements, self._context)

    def finish(self) -> Mapping[str, float]:
        """`loss`: mean over judgements, before the update; `judgements`: how many."""
        return {"loss": self.loss / len(self._judgements), "judgements": float(len(self._judgements))}


class _Minibatch:
    """Implements `Minibatch`."""

    def __init__(self, algorithm: FromJudgements, batch: _Batch, judgements: Batch, context: UpdateContext) -> None:
        self._algorithm, self._batch, self._context = algorithm, batch, context
        shared = SharedTexts.of(judgements)
        self.denominators = {"judgements": len(judgements)}
        self._loss = algorithm.loss(shared)
        self._texts = [algorithm.fitted(text) for text in shared.texts]
        groups = pack([len(ids) for ids in self._texts], context.microbatch_tokens)
        self._order = torch.tensor([place for group in groups for place in group], device=algorithm.model.device).argsort()
        fits = sum(len(group) * len(self._texts[group[-1]]) for group in groups) <= context.microbatch_tokens
        self._again: dict[int, tuple[Tensor, Tensor]] = {}
        if not fits:
            self._read_ahead(groups)
        self.micro_batches: Sequence[Sequence[Sequence[int]]] = [groups] if fits else [[group] for group in groups]

    def losses(self, micro: Sequence[Sequence[int]]) -> Mapping[str, Tensor]:
        """See `Minibatch`. A micro-batch is groups of texts, each of one pass: all groups, or one that is read again."""
        if not self._again:
            scores = torch.cat([self._algorithm.read(self._of(group)) for group in micro])[self._order]
            loss = self._loss(scores)
            self._batch.loss += float(loss.detach())
            return {"judgements": loss}
        [group] = micro
        state, gradient = self._again[group[0]]
        return {"judgements": (self._algorithm.read(self._of(group), state) * gradient).sum()}

    def check(self) -> None:
        """A loss that is not finite has a gradient that is not, which the trainer refuses."""

    def _of(self, group: Sequence[int]) -> list[list[int]]:
        return [self._texts[place] for place in group]

    def _read_ahead(self, groups: Sequence[Sequence[int]]) -> None:
        states: list[Tensor] = []
        parts: list[Tensor] = []
        with torch.no_grad():
            for group in groups:
                self._context.stop_if_asked()
                states.append(self._algorithm.dropout_state())
                parts.append(self._algorithm.read(self._of(group)))
        scores = torch.cat(parts)[self._order].requires_grad_()
        loss = self._loss(scores)
        self._batch.loss += float(loss.detach())
        (gradient,) = torch.autograd.grad(loss, [scores])
        for group, state in zip(groups, states, strict=True):
            self._again[group[0]] = (state, gradient[torch.tensor(group, device=gradient.device)])


def judgement_batches(judgements: Sequence[Judgement], section: RewardTrainingSettings, *, seed: int) -> Epochs[Batch]:
    """One epoch: batches keep the judgements' order inside, and come in an order of the seed.

    Raises:
        InvalidArgument: when there are no judgements.
    """
    batches = batch_judgements(judgements, texts=section.batch_texts)
    if not batches:
        raise InvalidArgument("judgements", "there are none to learn from")
    return Epochs(len(batches), lambda order: [batches[number] for number in order], seed=seed, epochs=1)


def reward_trainer(
    model: RewardModel, section: RewardTrainingSettings, *, rng: torch.Generator, prefix: Tokens = ()
) -> Trainer[Batch, TrainedReward]:
    """A trainer of a reward model: AdamW with betas 0.9 and 0.98, one step a batch. See `FromJudgements`."""
    trained = TrainedReward(model)
    groups = decayed_matrices(trained.trainable().values(), section.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=section.learning_rate, betas=(0.9, 0.98), fused=True)
    settings = TrainSettings(
        learning_rate=section.learning_rate,
        epochs=1,
        max_grad_norm=section.gradient_norm,
        microbatch_tokens=section.microbatch_tokens,
    )
    algorithm = FromJudgements(model, section, rng=rng, prefix=prefix)
    return Trainer(trained, algorithm, optimizer, settings=settings, generator=rng)


def reward_rate(section: RewardTrainingSettings) -> Rate:
    """The learning rate that the settings ask for."""
    return warmup_then_linear(section.learning_rate, warmup=section.warmup)


def accuracy(model: RewardModel, comparisons: Sequence[Ranking], prefix: Tokens = ()) -> float:
    """The share of comparisons whose first response has the higher score than the second; equal scores count one half."""
    if not comparisons:
        raise InvalidArgument("comparisons", "there are none to agree with")
    pairs = [(item.prompt + item.responses[0], item.prompt + item.responses[1]) for item in comparisons]
    index = {sequence: place for place, sequence in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
    scores = model.rewards([model.fitted(sequence, prefix)[0] for sequence in index])
    margins = torch.tensor([scores[index[better]] - scores[index[worse]] for better, worse in pairs])
    return float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean())
