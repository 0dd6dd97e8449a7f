"""Updates on single responses that somebody called good or bad: what is the same for every algorithm of that kind.

Beside its own response each prompt is read with that to another prompt (`data.labelled.mismatched`): what the policy thinks
of those against the reference is what the algorithm judges the others by. It is computed once for each minibatch, without
gradient, from the policy as it is then, and does not depend on how the minibatch is cut for the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from honed.learner.algorithms.base import OnLabelled
from honed.learner.data.labelled import Labelled, mismatched
from honed.learner.models.policy import PolicyModel, ReferenceModel, TokenModel
from honed.learner.train.algorithm import State, UpdateContext
from honed.learner.train.responses import MicroExamples, Sided, micro_examples, response_logprobs


class OnLabelledUpdates:
    """An algorithm on labelled responses, as the trainer asks for it. Implements `Algorithm`."""

    def __init__(self, algorithm: OnLabelled, policy: PolicyModel, reference: ReferenceModel | None) -> None:
        """Takes the parts; the trainer moves `policy`. `reference` may be missing where the algorithm needs none."""
        self.algorithm, self.policy, self.reference = algorithm, policy, reference

    def prepare(self, batch: Sequence[Labelled], context: UpdateContext) -> _Batch:
        """See `Algorithm`: the reference reads each response once, and each again after another prompt."""
        return _Batch(self, batch, context)

    def state(self) -> State:
        """Nothing."""
        return {}

    def load_state(self, state: State) -> None:
        """Nothing."""


class _Batch:
    """A batch that the reference has read. Implements `Prepared`."""

    def __init__(self, updates: OnLabelledUpdates, batch: Sequence[Labelled], context: UpdateContext) -> None:
        self.updates, self.batch, self.context = updates, batch, context
        self._mismatched = mismatched(batch)
        everything = range(len(batch))
        self.reference = self._read(updates.reference, batch, everything)
        self._mismatched_reference = self._read(updates.reference, self._mismatched, everything)
        self.desirable = torch.tensor([example.desirable for example in batch], device=updates.policy.device)
        self.figures: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        self._tokens = 0
        self._log_ratios: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.batch)

    def minibatch(self, chosen: Sequence[int]) -> _Minibatch:
        """See `Prepared`."""
        policy = self.updates.policy
        read = self._read(policy, self._mismatched, chosen) - self._mismatched_reference
        log_ratios = read[torch.tensor(chosen, device=policy.device)]
        packed = micro_examples(self.batch, chosen, self.context.microbatch_tokens, policy)
        self._log_ratios.append(log_ratios)
        self._tokens += sum(len(micro.batch.targets) for micro in packed)
        return _Minibatch(self, packed, log_ratios)

    def finish(self) -> Mapping[str, float]:
        """See `Prepared`. Means are over responses and all passes.

        - `responses`: how many; `tokens`: theirs, over all passes.
        - `desirable`: share of the responses that were called good.
        - `mismatched_log_ratio`: of the policy to the reference, nats a response, after prompts that are not the response's.
        - `loss`, and what the algorithm tells of each response: of all, of the desirable (`desirable_loss`) and of the others
          (`undesirable_loss`), where there are any.
        """
        desirable = torch.cat([labels for labels, _ in self.figures]).cpu()
        told: dict[str, float] = {}
        for name in self.figures[0][1]:
            values = torch.cat([figures[name] for _, figures in self.figures]).double().cpu()
            told[name] = float(values.mean())
            for prefix, chosen in (("desirable_", desirable), ("undesirable_", ~desirable)):
                if bool(chosen.any()):
                    told[prefix + name] = float(values[chosen].mean())
        return {
            "responses": float(len(self.batch)),
            "tokens": float(self._tokens),
            "desirable": float(desirable.double().mean()),
            "mismatched_log_ratio": float(torch.cat(self._log_ratios).double().mean()),
            **told,
        }

    @torch.no_grad()
    def _read(self, model: TokenModel | None, examples: Sequence[Sided], chosen: Sequence[int]) -> Tensor:
        """Log-probability of the responses of `chosen`, in a row of all; zero for the rest, and without a model."""
        device = self.updates.policy.device
        found = torch.zeros(len(examples), device=device)
        if model is not None:
            for micro in micro_examples(examples, chosen, self.context.microbatch_tokens, model):
                self.context.stop_if_asked()
                [found[micro.examples]] = response_logprobs(model, micro)
        return found


class _Minibatch:
    """Implements `Minibatch`."""

    def __init__(self, batch: _Batch, packed: Sequence[MicroExamples], mismatched_log_ratios: Tensor) -> None:
        self._batch, self.micro_batches, self._mismatched = batch, packed, mismatched_log_ratios
        self.denominators = {"responses": len(mismatched_log_ratios)}

    def losses(self, micro: MicroExamples) -> Mapping[str, Tensor]:
        """See `Minibatch`."""
        updates = self._batch.updates
        [now] = response_logprobs(updates.policy, micro)
        desirable = self._batch.desirable[micro.examples]
        found = updates.algorithm.losses(now - self._batch.reference[micro.examples], desirable, self._mismatched)
        self._batch.figures.append((desirable, {"loss": found.loss.detach(), **found.per_response}))
        return {"responses": found.loss.sum()}

    def check(self) -> None:
        """A loss that is not finite has a gradient that is not, which the trainer refuses."""
