"""A supervised loss beside an algorithm's, in the same optimizer steps: PPO-ptx of InstructGPT (Ouyang et al. 2022), for any.

`loss = loss of the algorithm + coefficient x mean cross-entropy of the examples' tokens`. Each rollout brings some examples
with it, so that a minibatch has its share of them. Which they are follows from the update's number: one that is made again
reads the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from honed.learner.data.continuation import Demonstration
from honed.learner.supervised.language_model import NextToken
from honed.learner.train.algorithm import Algorithm, Minibatch, Prepared, State, UpdateContext

Examples = Callable[[int, int], Sequence[Demonstration]]
"""The examples of a mixture without end: from one of a number, from 0, so many."""

_TOKENS: Final = "ptx_tokens"


@dataclass(frozen=True)
class MixedIn:
    """What is mixed in.

    Attributes:
        coefficient: Of its loss.
        share: Examples a rollout; a half brings one with every other rollout.
        batch: Rollouts of an update, as the run asks for them.
        examples: Where they come from.
    """

    coefficient: float
    share: float
    batch: int
    examples: Examples


class Mixture:
    """An algorithm and what is mixed in. Implements `Algorithm`."""

    def __init__(self, algorithm: Algorithm[Any], supervised: NextToken, mixed_in: MixedIn) -> None:
        """Takes the parts; both read the same policy."""
        self._algorithm, self._supervised, self._mixed_in = algorithm, supervised, mixed_in

    def prepare(self, batch: Sequence[Any], context: UpdateContext) -> _Batch:
        """See `Algorithm`."""
        prepared, mixed = self._algorithm.prepare(batch, context), self._mixed_in
        # Places follow from the batch that was asked for: one that came out smaller, or larger, moves no later one.
        first, count = int(context.step * mixed.batch * mixed.share), int(len(prepared) * mixed.share)
        examples = mixed.examples(first, count)
        return _Batch(prepared, self._supervised.prepare(examples, context) if count else None, mixed)

    def state(self) -> State:
        """See `Algorithm`: the update's number says which examples come next."""
        return self._algorithm.state()

    def load_state(self, state: State) -> None:
        """See `Algorithm`."""
        self._algorithm.load_state(state)


class _Batch:
    """Implements `Prepared`."""

    def __init__(self, prepared: Prepared, examples: Prepared | None, mixed: MixedIn) -> None:
        self._prepared, self._examples, self._mixed = prepared, examples, mixed

    def __len__(self) -> int:
        return len(self._prepared)

    def minibatch(self, chosen: Sequence[int]) -> Minibatch:
        """See `Prepared`: the examples of these rollouts are in it too."""
        prepared, share = self._prepared.minibatch(chosen), self._mixed.share
        places = [place for index in chosen for place in range(int(index * share), int((index + 1) * share))]
        if self._examples is None or not places:
            return prepared
        return _Minibatch(prepared, self._examples.minibatch(places), self._mixed.coefficient)

    def finish(self) -> Mapping[str, float]:
        """See `Prepared`. `ptx_loss`: of the examples, nats a token, mean over all passes; `ptx_tokens`: how many."""
        figures = dict(self._prepared.finish())
        if self._examples is not None:
            told = self._examples.finish()
            figures |= {"ptx_loss": told["loss"], "ptx_tokens": told["tokens"]}
        return figures


class _Minibatch:
    """Implements `Minibatch`."""

    def __init__(self, prepared: Minibatch, examples: Minibatch, coefficient: float) -> None:
        self._prepared, self._examples, self._coefficient = prepared, examples, coefficient
        self.micro_batches = [
            *((prepared.losses, micro) for micro in prepared.micro_batches),
            *((self._losses, micro) for micro in examples.micro_batches),
        ]
        self.denominators = {**prepared.denominators, _TOKENS: examples.denominators["tokens"]}

    def losses(self, micro: tuple[Callable[[Any], Mapping[str, Tensor]], Any]) -> Mapping[str, Tensor]:
        """See `Minibatch`."""
        losses, batch = micro
        return losses(batch)

    def check(self) -> None:
        """See `Minibatch`."""
        self._prepared.check()

    def _losses(self, micro: Any) -> Mapping[str, Tensor]:
        return {_TOKENS: self._coefficient * self._examples.losses(micro)["tokens"]}
