"""Two responses to one prompt, of which one is better: people preferred it, or its score is higher."""

from __future__ import annotations

from dataclasses import dataclass

from honed.learner.data.continuation import Demonstration

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Token ids as the policy reads them.

    Attributes:
        rollout_id: Names it in the journal.
        prompt: At least one token: the tokenizer's first one for texts that stand alone.
        chosen: The better response.
        rejected: The worse one.
        temperature: That both were sampled at; 1 for what people compared.
    """

    rollout_id: str
    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    temperature: float = 1.0

    @property
    def sides(self) -> tuple[Demonstration, Demonstration]:
        """The better continuation and the worse one."""
        return (
            Demonstration(self.prompt, self.chosen, self.temperature),
            Demonstration(self.prompt, self.rejected, self.temperature),
        )
