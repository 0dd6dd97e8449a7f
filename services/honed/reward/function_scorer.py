"""Python functions as scorers, found by entry points of the group `honed.scorers`.

A package offers one in its pyproject.toml:

    [project.entry-points."honed.scorers"]
    politeness = "my_package.rewards:politeness"

and the run file names it: `scorers: [{name: polite, kind: function, source: politeness}]`. The function is

    def politeness(samples: Sequence[Sample]) -> Sequence[float]: ...

It runs in the one compute thread of the service, so it must not wait for anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from honed.kit.errors import FailedPrecondition, NotFound
from honed.reward.scorer import Kind, ScorerFailed, ScorerInput, ScorerOutput

GROUP = "honed.scorers"


@dataclass(frozen=True, slots=True)
class Sample:
    """What a function sees.

    Attributes:
        prompt: The prompt's text; empty when the settings say that the scorer does not see it.
        response: The response's text.
    """

    prompt: str
    response: str


ScoreFunction = Callable[[Sequence[Sample]], Sequence[float]]


class FunctionScorer:
    """One function, in the version of the distribution that provides it."""

    kind: Kind = "function"
    max_tokens = 0

    def __init__(self, name: str, function: ScoreFunction, version: str, *, sees_prompt: bool = True) -> None:
        """Wraps a function.

        Args:
            name: The scorer's name in the settings.
            function: See the module.
            version: Changes whenever the function may answer differently.
            sees_prompt: Whether it gets the prompt too.
        """
        self.name = name
        self.version = version
        self._function = function
        self._sees_prompt = sees_prompt

    def score(self, batch: Sequence[ScorerInput]) -> list[ScorerOutput]:
        """See `Scorer`."""
        samples = [Sample(item.prompt_text if self._sees_prompt else "", item.response_text) for item in batch]
        try:
            values = list(self._function(samples))
        except Exception as error:
            # Whatever a user's function raises concerns this batch, never the service.
            sample = 0 if len(batch) == 1 else None
            raise ScorerFailed(self.name, self.version, f"{type(error).__name__}: {error}", sample) from error
        if len(values) != len(batch):
            raise ScorerFailed(self.name, self.version, f"it returned {len(values)} values for {len(batch)} samples")
        return [ScorerOutput(self._number(value, index)) for index, value in enumerate(values)]

    def _number(self, value: object, index: int) -> float:
        try:
            number = float(value)  # type: ignore[arg-type]  # numpy and torch scalars are welcome
        except (TypeError, ValueError) as error:
            reason = f"it returned {value!r}, which is no number"
            raise ScorerFailed(self.name, self.version, reason, index) from error
        if not math.isfinite(number):
            raise ScorerFailed(self.name, self.version, f"it returned {number}, which is not finite", index)
        return number


def find_function(
    name: str, source: str, *, sees_prompt: bool = True, find: Callable[[], Sequence[EntryPoint]] | None = None
) -> FunctionScorer:
    """Loads the function `source` of the entry-point group `honed.scorers`.

    Args:
        name: The scorer's name in the settings.
        source: The entry point's name.
        sees_prompt: Whether the function gets the prompt too.
        find: Lists the entry points; what is installed by default.

    Raises:
        NotFound: No installed distribution offers it; names those that exist.
        FailedPrecondition: Two distributions offer it, it cannot be imported, or it is no function.
    """
    offered = list(find() if find is not None else entry_points(group=GROUP))
    found = [point for point in offered if point.name == source]
    if not found:
        known = ", ".join(sorted({point.name for point in offered})) or "none"
        raise NotFound(f"scorer '{name}': no entry point {source!r} in the group {GROUP}; installed: {known}")
    if len({point.value for point in found}) > 1:
        places = ", ".join(_distribution(point) for point in found)
        raise FailedPrecondition(f"scorer '{name}': the function {source!r} is offered by {places}; uninstall all but one")
    try:
        function = found[0].load()
    except Exception as error:  # importing runs a user's module
        raise FailedPrecondition(f"scorer '{name}': {found[0].value} cannot be imported: {error}") from error
    if not callable(function):
        raise FailedPrecondition(f"scorer '{name}': {found[0].value} is a {type(function).__name__}, not a function")
    return FunctionScorer(name, function, _distribution(found[0]), sees_prompt=sees_prompt)


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "unknown distribution"
