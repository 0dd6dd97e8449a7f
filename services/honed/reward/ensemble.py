"""Several reward models as one scorer, with how far they disagree.

Reward models that agree on what people have judged disagree on what nobody has: where the policy leaves the data, the least of
them, or the mean less their deviation, is harder to deceive than one alone (Coste et al. 2024, "Reward Model Ensembles Help
Mitigate Overoptimization": mean, worst case, and uncertainty-weighted). Members should be on one scale, as honed's own reward
models are: their rewards of the reference policy have mean 0 and deviation 1.

Each sample becomes tokens once for all members that read the same tokens. Members may have tokenizers of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

from honed.kit.errors import FailedPrecondition
from honed.reward.model_scorer import ModelScorer
from honed.reward.scorer import Kind, ScorerInput, ScorerOutput
from honed.reward.settings import EnsembleOptions


class EnsembleScorer:
    """Reward models that score together."""

    longest_s = 0.0
    kind: Kind = "ensemble"

    def __init__(self, name: str, members: Sequence[ModelScorer], options: EnsembleOptions) -> None:
        """Takes loaded models, in the order of the settings.

        Args:
            name: The scorer's name in the settings.
            members: All of which see the prompt, or none.
            options: How they are combined.

        Raises:
            FailedPrecondition: Two members are the same model, so that their deviation would say nothing.
        """
        versions = [member.version for member in members]
        for index, version in enumerate(versions):
            if (first := versions.index(version)) < index:
                raise FailedPrecondition(
                    f"scorer '{name}': {options.members[first]} and {options.members[index]} are the same model; train the "
                    "second with another `seed`, or leave it out"
                )
        self.name = name
        self._members, self._options = tuple(members), options
        made_of = [versions, options.combine, options.k]
        self.version = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        self.max_tokens = min((member.max_tokens for member in members if member.max_tokens), default=0)

    def score(self, batch: Sequence[ScorerInput]) -> list[ScorerOutput]:
        """See `Scorer`."""
        tokens: dict[str, list[list[int]]] = {}
        columns = []
        for member in self._members:
            if member.tokens_as not in tokens:
                tokens[member.tokens_as] = member.tokens(batch)
            columns.append(member.score_tokens(tokens[member.tokens_as]))
        return [self._combined(row) for row in zip(*columns, strict=True)]

    def _combined(self, outputs: Sequence[ScorerOutput]) -> ScorerOutput:
        values = tuple(output.value for output in outputs)
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        match self._options.combine:
            case "mean":
                value = mean
            case "minimum":
                value = min(values)
            case "mean_minus_std":
                value = mean - self._options.price * deviation
        return ScorerOutput(value, max(output.truncated_tokens for output in outputs), values, deviation)
