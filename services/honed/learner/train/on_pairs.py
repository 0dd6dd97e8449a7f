"""Updates on pairs of responses: what is the same for every algorithm of that kind, around what `algorithms` declares.

A pair's two responses are read in one pass, so that its loss has both; the reference reads them once, before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from honed.learner.algorithms.base import OnPairs
from honed.learner.data.pair import Pair
from honed.learner.models.policy import PolicyModel, ReferenceModel, TokenModel
from honed.learner.train.algorithm import State, UpdateContext
from honed.learner.train.means import MeanOverTokens
from honed.learner.train.responses import MicroExamples, micro_examples, response_logprobs


class OnPairUpdates:
    """An algorithm on pairs, as the trainer asks for it. Implements `Algorithm`."""

    def __init__(self, algorithm: OnPairs, policy: PolicyModel, reference: ReferenceModel | None) -> None:
        """Takes the parts; the trainer moves `policy`. `reference` may be missing where the algorithm needs none."""
        self.algorithm, self.policy, self.reference = algorithm, policy, reference

    @torch.no_grad()
    def prepare(self, batch: Sequence[Pair], context: UpdateContext) -> _Batch:
        """See `Algorithm`: one pass of the reference."""
        reference = torch.zeros(2, len(batch), device=self.policy.device)
        if self.reference is not None:
            for micro in micro_examples(batch, range(len(batch)), context.microbatch_tokens, self.policy):
                context.stop_if_asked()
                reference[:, micro.examples] = self.of_responses(self.reference, micro)
        return _Batch(self, batch, context, reference)

    def of_responses(self, model: TokenModel, micro: MicroExamples) -> Tensor:
        """Log-probability of each response, `[2, P]`, the better ones first: sum over its tokens, or mean."""
        return response_logprobs(model, micro, mean=self.algorithm.mean)

    def state(self) -> State:
        """Nothing."""
        return {}

    def load_state(self, state: State) -> None:
        """Nothing."""


class _Batch:
    """A batch that the reference has read. Implements `Prepared`."""

    def __init__(self, updates: OnPairUpdates, pairs: Sequence[Pair], context: UpdateContext, reference: Tensor) -> None:
        self.updates, self.pairs, self.reference = updates, pairs, reference
        self.means, self._context = MeanOverTokens(), context
        self._tokens = 0

    def __len__(self) -> int:
        """Its pairs."""
        return len(self.pairs)

    def minibatch(self, chosen: Sequence[int]) -> _Minibatch:
        """See `Prepared`."""
        packed = micro_examples(self.pairs, chosen, self._context.microbatch_tokens, self.updates.policy)
        self._tokens += sum(len(micro.batch.targets) for micro in packed)
        return _Minibatch(self, packed)

    def finish(self) -> Mapping[str, float]:
        """See `Prepared`. Means are over pairs and all passes.

        - `pairs`: how many; `tokens`: of their responses, over all passes.
        - `loss`, and what the algorithm tells of each pair.
        """
        return {
            "pairs": float(len(self.pairs)),
            "tokens": float(self._tokens),
            **self.means.all(),
        }


class _Minibatch:
    """Implements `Minibatch`."""

    def __init__(self, batch: _Batch, packed: Sequence[MicroExamples]) -> None:
        self._batch, self.micro_batches = batch, packed
        self.denominators = {"pairs": sum(len(micro.examples) for micro in packed)}

    def losses(self, micro: MicroExamples) -> Mapping[str, Tensor]:
        """See `Minibatch`."""
        updates = self._batch.updates
        now = updates.of_responses(updates.policy, micro) - self._batch.reference[:, micro.examples]
        found = updates.algorithm.losses(now[0], now[1])
        self._batch.means.add(loss=found.loss, **found.per_pair)
        return {"pairs": found.loss.sum()}

    def check(self) -> None:
        """A loss that is not finite has a gradient that is not, which the trainer refuses."""
