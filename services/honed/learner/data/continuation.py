"""A prompt and the response to it, as a language model is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Continuation(Protocol):
    """What a micro-batch is made of."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids that are read and not learned; at least one."""

    @property
    def response(self) -> Sequence[int]:
        """Token ids to learn; at least one."""

    @property
    def temperature(self) -> float:
        """That the response was sampled at; 1 for what nobody sampled."""


@dataclass(frozen=True)
class Demonstration:
    """A continuation to imitate. A text that is learned as a whole has its first token for a prompt."""

    prompt: Sequence[int]
    response: Sequence[int]
    temperature: float = 1.0
