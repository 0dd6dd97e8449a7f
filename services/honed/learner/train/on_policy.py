"""Updates on sampled responses: what is the same for every algorithm of that kind, around what `algorithms` declares.

The models read the batch once. The policy before the update is the *proximal* policy; the one that sampled, perhaps some
versions ago, is the *behaviour* policy, whose log-probabilities came with the episodes. Rows are `[B, T]` on the host, T the
longest response, zero where none is.

Where the first step trains on the whole batch, its weights are those that read it: the last micro-batch that is read is read
with gradient, and trained on first, without another pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from honed.learner.algorithms.base import OnPolicy
from honed.learner.data.batches import MicroBatch, Rows, pack_on
from honed.learner.data.episode import Episode
from honed.learner.models.policy import PolicyModel, ReferenceModel, TokenEvaluation
from honed.learner.objectives.kl import KLController
from honed.learner.objectives.normalise import RewardNormaliser, batch_rewards, is_constant, placed_rewards
from honed.learner.objectives.policy_gradient import approximate_kl_terms, behaviour_weights
from honed.learner.settings import LearnerSettings
from honed.learner.train.algorithm import BadLoss, State, UpdateContext
from honed.learner.train.means import MeanOverTokens
from honed.learner.train.sampled import Sampled, repeated_of, rows_of, sampled_by, score_means
from honed.learner.train.trainer import Trainer

PolicyTrainer = Trainer[Sequence[Episode], PolicyModel]
"""What learns from sampled responses."""


class OnPolicyUpdates:
    """An algorithm on sampled responses, as the trainer asks for it: with its models, KL coefficient and normalisation."""

    def __init__(
        self,
        algorithm: OnPolicy,
        policy: PolicyModel,
        reference: ReferenceModel | None,
        learner: LearnerSettings,
        *,
        kl: KLController,
        normaliser: RewardNormaliser,
        response_tokens: int | None = None,
    ) -> None:
        """Takes the parts; the trainer moves `policy`.

        Args:
            algorithm: What is learned from a batch.
            policy: Learns.
            reference: Stays as it is; it may be missing where the algorithm needs none.
            learner: The numbers.
            kl: The KL coefficient.
            normaliser: Of scores.
            response_tokens: The most tokens that a response may have, for `masked_share`; None: as many as a batch's longest.
        """
        self.response_tokens = response_tokens
        self.algorithm, self.policy, self.reference, self.learner = algorithm, policy, reference, learner
        self.kl, self.normaliser = kl, normaliser

    def prepare(self, batch: Sequence[Episode], context: UpdateContext) -> _Batch:
        """See `Algorithm`: one pass of policy and reference, and what the algorithm computes once a batch."""
        packed = self.pack(batch, range(len(batch)), context)
        sampled, entropy, first = self._read(batch, packed, context)
        gap = float((sampled.proximal - sampled.behaviour)[sampled.mask].exp().mean())
        check_ratio("sampler", gap, self.learner.max_ratio)
        return _Batch(self, batch, context, packed, sampled, self.algorithm.rows(sampled), entropy, first)

    def pack(self, batch: Sequence[Episode], chosen: Sequence[int], context: UpdateContext) -> list[MicroBatch]:
        """Micro-batches of the chosen episodes; those of a group share their prompt."""
        models = (self.policy, self.policy.critic, self.reference)
        share = self.algorithm.needs.group > 1 and all(model.packed for model in models if model is not None)
        return pack_on(self.policy.device, batch, chosen, context.microbatch_tokens, share_prompts=share)

    def state(self) -> State:
        """See `Algorithm`."""
        return {"kl": self.kl.state(), "normaliser": self.normaliser.state()}

    def load_state(self, state: State) -> None:
        """See `Algorithm`."""
        self.kl.load_state(state["kl"])
        self.normaliser.load_state(state["normaliser"])

    @torch.no_grad()
    def _read(
        self, batch: Sequence[Episode], packed: Sequence[MicroBatch], context: UpdateContext
    ) -> tuple[Sampled, float, TokenEvaluation | None]:
        """The batch before the update, the policy's mean entropy in nats a token, and the pass that the first step can use."""
        rows = Rows.of(batch)
        # Filled where the models are, and fetched once: a fetch for each micro-batch would make the host wait for the device.
        read = torch.zeros(3, rows.mask.numel(), device=self.policy.device)
        means, first = MeanOverTokens(), None
        for micro in reversed(packed):
            context.stop_if_asked()
            with torch.set_grad_enabled(context.whole and micro is packed[0]):
                if self.reference is None:
                    measured = self.policy.measure(micro)
                else:
                    measured, read[1, micro.slots] = self.reference.beside(self.policy, micro)
            read[0, micro.slots], read[2, micro.slots] = measured.logprobs.detach(), measured.values.detach()
            means.add(entropy=measured.entropies)
            first = measured if measured.logprobs.requires_grad else None
        proximal, reference, values = read.cpu().view(3, *rows.mask.shape)
        numbers: dict[str, int] = {}
        scores = batch_rewards(self.normaliser, batch)
        sampled = Sampled(
            mask=rows.mask,
            behaviour=rows.behaviour,
            proximal=proximal,
            reference=reference if self.reference is not None else proximal,
            values=values,
            weights=behaviour_weights(proximal, rows.behaviour, self.learner.importance_cap),
            scores=torch.tensor(scores),
            raw_scores=torch.tensor([episode.reward for episode in batch], dtype=torch.float64),
            repeated=torch.tensor(repeated_of(batch)),
            groups=torch.tensor([numbers.setdefault(episode.group_id, len(numbers)) for episode in batch]),
            cut=torch.tensor([episode.cut for episode in batch]),
            beta=self.kl.value,
            placed=rows_of(placed_rewards(self.normaliser, batch, scores), rows.mask),
        )
        return sampled, means["entropy"], first


class _Batch:
    """A batch that was read. Implements `Prepared`."""

    def __init__(
        self,
        updates: OnPolicyUpdates,
        episodes: Sequence[Episode],
        context: UpdateContext,
        packed: Sequence[MicroBatch],
        sampled: Sampled,
        rows: Mapping[str, Tensor],
        entropy: float,
        first: TokenEvaluation | None,
    ) -> None:
        self.updates, self.episodes, self.sampled, self.rows = updates, episodes, sampled, rows
        self.means, self.largest_ratio = MeanOverTokens(), 0.0
        self._context, self._packed, self._entropy, self._first = context, packed, entropy, first
        numbers = torch.arange(len(episodes)).unsqueeze(1).expand(sampled.mask.shape)
        known = {
            "proximal": sampled.proximal,
            "reference": sampled.reference,
            "values": sampled.values,
            "weights": sampled.weights,
            "response": numbers.contiguous(),
            **rows,
        }
        device = updates.policy.device
        self.known = {name: each.to(device) for name, each in known.items()}

    def evaluate(self, micro: MicroBatch) -> TokenEvaluation:
        """What the policy says of a micro-batch now, with gradient."""
        first, self._first = self._first, None
        return first if first is not None and micro is self._packed[0] else self.updates.policy.evaluate(micro)

    def __len__(self) -> int:
        """Its responses."""
        return len(self.episodes)

    def minibatch(self, chosen: Sequence[int]) -> _Minibatch:
        """See `Prepared`."""
        index = torch.tensor(sorted(chosen))
        own = self.updates.algorithm.minibatch_rows(self.sampled, self.rows, index)
        known = dict(self.known)
        for name, rows in own.items():
            whole = torch.zeros_like(self.sampled.proximal)
            whole[index] = rows
            known[name] = whole.to(self.updates.policy.device)
        whole_batch = len(chosen) == len(self.episodes)
        packed = self._packed if whole_batch else self.updates.pack(self.episodes, chosen, self._context)
        return _Minibatch(self, index, packed, known)

    def finish(self) -> Mapping[str, float]:
        """See `Prepared`: the KL controller moves. Means are over action tokens unless another base is named.

        - `episodes`, `tokens`: how many.
        - `score_mean`, `score_std`: over episodes, of the score as it came; the population deviation.
        - `score/NAME`: mean of what the scorer NAME said, before its weight.
        - `cut_share`: of responses that reached the limit of their length.
        - `reward_constant`: 1 if all scores of the batch were the same, so that they taught nothing; else 0.
        - `kl`: see `Sampled.kl`; not there without a reference. `entropy`: nats a token. Both before the update.
        - `beta`, `next_beta`: KL coefficient of this update and of the next.
        - `approxkl`, `ratio_mean`, `ratio_max`: of the policy to the proximal policy, over all epochs.
        - `behaviour_weight`, `behaviour_truncated`: mean importance weight, and the share of tokens at its cap.
        - `sampler_gap`: exp|proximal - behaviour|: staleness and numerical difference together. `sampler_gap_same_weights`:
          the same over tokens that the weights before this update sampled; not there if there were none, or the version is
          not known.
        - `masked_share`: of the tokens that the responses might have had at most, the share that they lack; it rises to nearly
          1 when they collapse to a token or two.
        - what the algorithm tells, and the means of its figures of each token over all epochs.
        """
        sampled, kl = self.sampled, self.updates.kl
        mask = sampled.mask
        if not math.isfinite(sampled.kl):
            raise BadLoss(f"the KL is {sampled.kl}")
        beta = kl.value
        if self.updates.reference is not None:
            kl.update(sampled.kl, len(self.episodes))
        scores = sampled.raw_scores
        gap = (sampled.proximal - sampled.behaviour).abs().exp()
        same = sampled_by(self._context.version, self.episodes, mask)
        return {
            "episodes": float(len(self.episodes)),
            "tokens": float(mask.sum()),
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std(correction=0)),
            **score_means(self.episodes),
            "cut_share": float(sampled.cut.double().mean()),
            "reward_constant": float(is_constant([episode.reward for episode in self.episodes])),
            **({"kl": sampled.kl} if self.updates.reference is not None else {}),
            "entropy": self._entropy,
            "ratio_max": self.largest_ratio,
            **self.means.all(),
            "behaviour_weight": float(sampled.weights[mask].mean()),
            "behaviour_truncated": float((sampled.weights[mask] >= self.updates.learner.importance_cap).float().mean()),
            "sampler_gap": float(gap[mask].mean()),
            **({"sampler_gap_same_weights": float(gap[same].mean())} if bool(same.any()) else {}),
            "beta": beta,
            "next_beta": kl.value,
            "masked_share": Rows(mask, sampled.behaviour).empty_share(self.updates.response_tokens),
            **self.updates.algorithm.figures(sampled, self.rows),
        }


class _Minibatch:
    """Some responses of a batch; `known` are rows of the whole batch. Implements `Minibatch`."""

    def __init__(self, batch: _Batch, index: Tensor, packed: Sequence[MicroBatch], known: Mapping[str, Tensor]) -> None:
        self.micro_batches = packed
        self._tokens = int(batch.sampled.mask[index].sum())
        trained = batch.rows.get("trained", batch.sampled.mask)[index]
        # At least 1: where nothing trains, the sums are 0.
        self.denominators = {"tokens": max(1, int(trained.sum())), "responses": max(1, int(trained.any(1).sum()))}
        self._batch, self._known, self._updates = batch, known, batch.updates
        device = self._updates.policy.device
        # Read once, at the end: reading them at each micro-batch would make the host wait for the device.
        self._largest, self._ratios = torch.zeros((), device=device), torch.zeros((), dtype=torch.float64, device=device)

    def losses(self, micro: MicroBatch) -> Mapping[str, Tensor]:
        """See `Minibatch`."""
        at = _AtTokens(self._known, micro)
        now = self._batch.evaluate(micro)
        losses = self._updates.algorithm.losses(self._batch.sampled, now, at)
        detached, proximal = now.logprobs.detach(), at["proximal"]
        ratio = (detached - proximal).exp()
        self._largest = torch.maximum(self._largest, (detached - proximal).max())
        self._ratios += ratio.sum(dtype=torch.float64)
        self._batch.means.add(approxkl=approximate_kl_terms(detached, proximal), ratio_mean=ratio, **losses.per_token)
        return losses.sums

    def check(self) -> None:
        """See `Minibatch`."""
        mean = float(self._ratios) / self._tokens
        check_ratio("proximal policy", mean, self._updates.learner.max_ratio)
        self._batch.largest_ratio = max(self._batch.largest_ratio, float(self._largest.exp()))


class _AtTokens(Mapping[str, Tensor]):
    """What rows hold of a micro-batch's action tokens, `[N]`; only what is asked for is picked."""

    def __init__(self, rows: Mapping[str, Tensor], micro: MicroBatch) -> None:
        self._rows, self._slots = rows, micro.slots
        self._picked: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._picked:
            self._picked[name] = self._rows[name].view(-1)[self._slots]
        return self._picked[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def check_ratio(to: str, mean: float, bound: float) -> None:
    """Refuses a batch whose mean importance ratio leaves the bounds.

    Raises:
        BadLoss: It does.
    """
    if not 1 / bound <= mean <= bound:
        raise BadLoss(f"the mean ratio to the {to} is {mean:.3g}, learner.max_ratio allows {1 / bound:g} to {bound:g}")
