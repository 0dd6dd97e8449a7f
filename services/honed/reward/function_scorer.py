"""Python functions as scorers, found by entry points of the group `honed.scorers`.

A package offers one in its pyproject.toml:

    [project.entry-points."honed.scorers"]
    politeness = "my_package.rewards:politeness"

and the run file names it: `scorers: [{name: polite, kind: function, source: politeness}]`. The function is

    def politeness(samples: Sequence[Sample]) -> Sequence[float]: ...

It runs in the one compute thread of the service, so it must not wait for anything without a bound.

The run file's `options` are keyword arguments: of the function, at each call; or of a class, which is made once, at the start,
and whose instance is called with the samples. A class refuses a wrong value by a ValueError, as pydantic's models do.

A class may have an attribute `needs_reference`: `honed check` then asks the prompts for one. One that waits for something says
by an attribute `longest_s` after how many seconds it gives up a batch.

One that rewards each token has an attribute `dense = True`: it gets the response's tokens, and returns for each sample not one
number but one for each token. Algorithms with a value head put them at their tokens; to others a response is worth their sum.

    def early(samples: Sequence[Sample]) -> Sequence[Sequence[float]]:
        return [[1.0 if "!" in token else 0.0 for token in sample.tokens] for sample in samples]

    early.dense = True

A function that raises InvalidArgument says that the sample is at fault (it needs a reference, say), and that another try would
give the same.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from honed.kit.errors import FailedPrecondition, InvalidArgument, NotFound
from honed.options import refused_option
from honed.reward.scorer import BadSample, Kind, NotAScore, ScorerFailed, ScorerInput, ScorerOutput

GROUP = "honed.scorers"


@dataclass(frozen=True, slots=True)
class Sample:
    """What a function sees.

    Attributes:
        prompt: The prompt's text; empty when the settings say that the scorer does not see it.
        response: The response's text.
        reference: What the prompt's author gave to compare responses with; empty if there is nothing.
        tokens: The text of each of the response's tokens, for a dense function. Joined they are the response: a token that ends
            in the middle of a character is empty, and the next one has all of it.
        token_ids: The ids of these tokens in the policy's vocabulary.
    """

    prompt: str
    response: str
    reference: str = ""
    tokens: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()


ScoreFunction = Callable[[Sequence[Sample]], Sequence[float] | Sequence[Sequence[float]]]


class FunctionScorer:
    """One function, in the version of the distribution that provides it."""

    kind: Kind = "function"
    max_tokens = 0

    def __init__(
        self, name: str, function: ScoreFunction, version: str, *, sees_prompt: bool = True, dense: bool | None = None
    ) -> None:
        """Wraps a function.

        Args:
            name: The scorer's name in the settings.
            function: See the module.
            version: Changes whenever the function may answer differently.
            sees_prompt: Whether it gets the prompt too.
            dense: Whether it rewards each token; None: its attribute `dense` says so.
        """
        self.name = name
        self.version = version
        self.dense = bool(getattr(function, "dense", False)) if dense is None else dense
        self.needs_reference = bool(getattr(function, "needs_reference", False))
        self.longest_s = float(getattr(function, "longest_s", 0.0))
        self._function = function
        self._sees_prompt = sees_prompt

    def score(self, batch: Sequence[ScorerInput]) -> list[ScorerOutput]:
        """See `Scorer`."""
        samples = [self._sample(item) for item in batch]
        try:
            returned: Any = self._function(samples)
            values = list(returned) if hasattr(returned, "__iter__") or hasattr(returned, "__getitem__") else None
        except Exception as error:
            # Whatever a user's function raises concerns this batch, never the service.
            if len(batch) > 1:  # which of them it concerns is found by trying them one by one
                raise ScorerFailed(self.name, self.version, f"{type(error).__name__}: {error}") from error
            if isinstance(error, InvalidArgument):
                raise BadSample(self.name, self.version, str(error), 0) from error
            raise ScorerFailed(self.name, self.version, f"{type(error).__name__}: {error}", 0) from error
        if values is None:
            wanted = f"a list of {len(batch)}, one for each sample, is wanted"
            raise NotAScore(self.name, self.version, f"it returned one {type(returned).__name__} where {wanted}")
        if len(values) != len(batch):
            raise NotAScore(self.name, self.version, f"it returned {len(values)} values for {len(batch)} samples")
        return [self._output(value, index) for index, value in enumerate(values)]

    def _sample(self, item: ScorerInput) -> Sample:
        prompt = item.prompt_text if self._sees_prompt else ""
        if not self.dense:
            return Sample(prompt, item.response_text, item.reference)
        return Sample(prompt, item.response_text, item.reference, item.response_pieces, item.response_ids)

    def _output(self, value: Any, index: int) -> ScorerOutput:
        if not self.dense:
            return ScorerOutput(self._number(value, index))
        try:
            each = list(value)
        except TypeError as error:
            reason = f"it returned {value!r} where one reward for each token is wanted (it has `dense = True`)"
            raise NotAScore(self.name, self.version, reason, index) from error
        rewards = tuple(self._number(one, index) for one in each)
        return ScorerOutput(math.fsum(rewards), token_values=rewards)

    def _number(self, value: object, index: int) -> float:
        try:
            number = float(value)  # type: ignore[arg-type]  # numpy and torch scalars are welcome
        except (TypeError, ValueError) as error:
            reason = f"it returned {value!r}, which is no number"
            if isinstance(value, Sequence) and not isinstance(value, str) and not self.dense:
                reason += "; a function that rewards each token says so by an attribute `dense = True`"
            raise NotAScore(self.name, self.version, reason, index) from error
        if not math.isfinite(number):
            raise NotAScore(self.name, self.version, f"it returned {number}, which is not finite", index)
        return number


def find_function(
    name: str,
    source: str,
    options: Mapping[str, Any] | None = None,
    *,
    sees_prompt: bool = True,
    find: Callable[[], Sequence[EntryPoint]] | None = None,
) -> FunctionScorer:
    """Loads the function `source` of the entry-point group `honed.scorers`.

    Args:
        name: The scorer's name in the settings.
        source: The entry point's name.
        options: What the run file gives it; see the module.
        sees_prompt: Whether the function gets the prompt too.
        find: Lists the entry points; what is installed by default.

    Raises:
        NotFound: No installed distribution offers it; names those that exist.
        FailedPrecondition: Two distributions offer it, it cannot be imported, or it is no function.
        InvalidArgument: It has no such option, or the value cannot be.
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
    options = options or {}
    made = _with_options(name, source, function, options)
    dense = bool(getattr(made, "dense", getattr(function, "dense", False)))  # a function with options is a partial one
    return FunctionScorer(name, made, _version(found[0], options), sees_prompt=sees_prompt, dense=dense)


def _with_options(name: str, source: str, function: Callable[..., Any], options: Mapping[str, Any]) -> ScoreFunction:
    """The function that takes the samples alone."""
    field = f"reward.scorers.{name}.options"
    is_class = isinstance(function, type)
    given = () if is_class else (None,)  # the samples stand before the options
    try:
        inspect.signature(function).bind(*given, **options)
    except TypeError as error:
        known = ", ".join(_options_of(function, len(given))) or "none"
        raise InvalidArgument(field, f"{error}; {source} has the options: {known}") from error
    except ValueError:  # something compiled, which does not tell its arguments
        pass
    if not is_class:
        return partial(function, **options)
    try:
        made: ScoreFunction = function(**options)
    except ValidationError as error:
        raise refused_option(error, field, source, _options_of(function, 0)) from None
    except InvalidArgument as error:
        raise InvalidArgument(f"{field}.{error.field}", error.reason) from error
    except (TypeError, ValueError) as error:
        raise InvalidArgument(field, f"{source} refuses {dict(options)}: {error}") from error
    except Exception as error:  # a package that it needs is not installed, say
        raise FailedPrecondition(f"scorer '{name}': {source} cannot be made: {error}") from error
    if not callable(made):
        raise FailedPrecondition(f"scorer '{name}': what {source} makes cannot be called: the class needs `__call__`")
    return made


def _options_of(function: Callable[..., Any], skipped: int) -> list[str]:
    """Names of the arguments behind the samples."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(function).parameters.values())[skipped:]
    return [parameter.name for parameter in parameters if parameter.kind in named]


def _version(point: EntryPoint, options: Mapping[str, Any]) -> str:
    """The distribution's name and version; with options also a digest of them, for they change the answers."""
    if not options:
        return _distribution(point)
    written = json.dumps(options, sort_keys=True, default=str)
    return f"{_distribution(point)} options {hashlib.sha256(written.encode()).hexdigest()[:12]}"


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "unknown distribution"
