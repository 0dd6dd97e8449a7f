"""Updates on pairs that are made of a batch of scored rollouts: the best response to a prompt and the worst."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from honed.learner.data.episode import Episode
from honed.learner.data.pair import Pair
from honed.learner.objectives.normalise import is_constant
from honed.learner.train.algorithm import Minibatch, Prepared, State, UpdateContext
from honed.learner.train.on_pairs import OnPairUpdates


class OnScoredPairs:
    """An algorithm on pairs that learns from rollouts. Implements `Algorithm`."""

    def __init__(self, updates: OnPairUpdates) -> None:
        """Takes what trains on pairs."""
        self._updates = updates

    def prepare(self, batch: Sequence[Episode], context: UpdateContext) -> _Batch:
        """See `Algorithm`. A batch whose scores tell no pair apart makes no step."""
        chosen = list(best_and_worst(batch))
        pairs = [pair_of(better, worse) for better, worse in chosen]
        prepared = self._updates.prepare(pairs, context)
        reference = prepared.reference.cpu()
        if self._updates.algorithm.mean:
            reference = reference * torch.tensor([[len(side.response) for side in pair] for pair in chosen]).view(-1, 2).t()
        return _Batch(batch, chosen, prepared, reference)

    def state(self) -> State:
        """See `Algorithm`."""
        return self._updates.state()

    def load_state(self, state: State) -> None:
        """See `Algorithm`."""
        self._updates.load_state(state)


def best_and_worst(episodes: Sequence[Episode]) -> Iterator[tuple[Episode, Episode]]:
    """Of each prompt whose responses do not all score the same, the best response and the worst; the earlier of equals."""
    for _, group in groupby(sorted(episodes, key=lambda each: each.group_id), key=lambda each: each.group_id):
        responses = list(group)
        best = max(responses, key=lambda each: each.reward)
        worst = min(responses, key=lambda each: each.reward)
        if best.reward > worst.reward:
            yield best, worst


def pair_of(better: Episode, worse: Episode) -> Pair:
    """Two responses to one prompt as a pair."""
    return Pair(better.rollout_id, better.prompt, better.response, worse.response, better.temperature)


class _Batch:
    """Implements `Prepared`."""

    def __init__(
        self,
        episodes: Sequence[Episode],
        chosen: Sequence[tuple[Episode, Episode]],
        prepared: Prepared,
        reference: Tensor,
    ) -> None:
        """`reference`: its log-probability of each response, summed over its tokens, `[2, P]`, nats."""
        self._episodes, self._chosen, self._prepared, self._reference = episodes, chosen, prepared, reference

    def __len__(self) -> int:
        return len(self._prepared)

    def minibatch(self, chosen: Sequence[int]) -> Minibatch:
        """See `Prepared`."""
        return self._prepared.minibatch(chosen)

    def finish(self) -> Mapping[str, float]:
        """See `Prepared`: what is told of pairs, and of the rollouts behind them.

        - `episodes`: how many. `score_mean`, `score_std`: of the score as it came; the population deviation.
        - `score_margin`: of a pair's better score over its worse one, mean.
        - `reward_constant`: 1 if all scores were the same, else 0. `constant_groups`: share of prompts that made no pair.
        - `kl`: mean over the responses of pairs of `logp - ref_logp` (k1), nats, by the sampler's log-probabilities.
        """
        rewards = [episode.reward for episode in self._episodes]
        scores = torch.tensor(rewards, dtype=torch.float64)
        prompts = len({episode.group_id for episode in self._episodes})
        figures = {
            **self._prepared.finish(),
            "episodes": float(len(rewards)),
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std(correction=0)),
            "reward_constant": float(is_constant(rewards)),
            "constant_groups": 1.0 - len(self._chosen) / prompts,
        }
        if self._chosen:
            sampled = torch.tensor([[sum(better.logprobs), sum(worse.logprobs)] for better, worse in self._chosen])
            figures["kl"] = float((sampled.t() - self._reference).mean())
            figures["score_margin"] = sum(b.reward - w.reward for b, w in self._chosen) / len(self._chosen)
        return figures
