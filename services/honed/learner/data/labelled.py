"""A response that somebody called good or bad, by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from honed.learner.data.continuation import Demonstration

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Labelled:
    """Token ids as the policy reads them.

    Attributes:
        rollout_id: Names it in the journal.
        prompt: At least one token: the tokenizer's first one for texts that stand alone.
        response: At least one token.
        desirable: Whether it was called good.
    """

    rollout_id: str
    prompt: Tokens
    response: Tokens
    desirable: bool

    @property
    def sides(self) -> tuple[Demonstration]:
        """The one continuation."""
        return (Demonstration(self.prompt, self.response),)


@dataclass(frozen=True)
class Mismatched:
    """A response after a prompt that it does not answer."""

    prompt: Tokens
    response: Tokens

    @property
    def sides(self) -> tuple[Demonstration]:
        """The one continuation."""
        return (Demonstration(self.prompt, self.response),)


def mismatched(batch: Sequence[Labelled]) -> list[Mismatched]:
    """For each example its prompt with a response to another one: the next in the batch, in a circle, whose prompt differs.

    Where all prompts are the same it is the next response, whatever its prompt. A response is cut where it would make a longer
    text than all of the batch are: the model may not be able to read more.
    """
    longest = max(len(example.prompt) + len(example.response) for example in batch)
    found = []
    for place, example in enumerate(batch):
        others = [*batch[place + 1 :], *batch[:place]]
        other = next((each for each in others if each.prompt != example.prompt), (*others, example)[0])
        found.append(Mismatched(example.prompt, other.response[: longest - len(example.prompt)]))
    return found
