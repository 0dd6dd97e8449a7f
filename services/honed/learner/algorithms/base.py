"""What an algorithm declares, and how one is found by its name.

An algorithm is one file of this package, named as in `learner.algorithm`. Neither this file nor an algorithm's imports torch:
run files are read, and their options checked, where it is not installed. Formulas stand in `objectives`, which does.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar, runtime_checkable

from honed.kit.errors import InvalidArgument
from honed.options import read_options
from honed.settings import Section

if TYPE_CHECKING:
    from torch import Tensor

    from honed.learner.models.policy import TokenEvaluation
    from honed.learner.settings import LearnerSettings
    from honed.learner.train.sampled import Sampled


@dataclass(frozen=True)
class Needs:
    """What has to be there.

    Attributes:
        reference: The frozen policy that the run started from.
        group: How many responses to one prompt an update must see together, at the least.
    """

    reference: bool = True
    group: int = 1


@dataclass(frozen=True)
class Losses:
    """Losses of one micro-batch.

    Attributes:
        sums: With gradient, by the name of what they are divided by: "tokens" or "responses" of the whole minibatch.
        per_token: Figures of each action token, `[N]`, whose means over the update are told.
    """

    sums: Mapping[str, Tensor]
    per_token: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PairLosses:
    """Losses of one micro-batch of pairs.

    Attributes:
        loss: Of each pair, `[P]`, with gradient.
        per_pair: Figures of each pair, `[P]`, whose means over the update are told.
    """

    loss: Tensor
    per_pair: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ResponseLosses:
    """Losses of one micro-batch of labelled responses.

    Attributes:
        loss: Of each response, `[P]`, with gradient.
        per_response: Figures of each response, `[P]`, without gradient, whose means over the update are told.
    """

    loss: Tensor
    per_response: Mapping[str, Tensor] = field(default_factory=dict)


class OnPolicy(Protocol):
    """An algorithm that learns from sampled responses. Rows are `[B, T]`, T the longest response, zero where none is."""

    needs: Needs
    """What has to be there, by the settings."""

    def rows(self, batch: Sampled) -> Mapping[str, Tensor]:
        """What is computed once a batch, as rows of all its responses by name.

        Rows `trained` (0 or 1) leave tokens out of the counts that losses are divided by.
        """

    def minibatch_rows(self, batch: Sampled, rows: Mapping[str, Tensor], index: Tensor) -> Mapping[str, Tensor]:
        """What is computed for one minibatch, as rows of the responses at `index`; nothing, unless an algorithm says so."""
        return {}

    def losses(self, batch: Sampled, now: TokenEvaluation, at: Mapping[str, Tensor]) -> Losses:
        """The losses of a micro-batch.

        Args:
            batch: What it is from.
            now: What the policy says of its action tokens, with gradient.
            at: What the rows hold of each action token, `[N]`: those of `rows` and `minibatch_rows`, `proximal`, `reference`,
                `values`, `weights` (of the behaviour), and `response`, the number of its response in the batch.
        """

    def figures(self, batch: Sampled, rows: Mapping[str, Tensor]) -> Mapping[str, float]:
        """What is told of each batch beside what is told for every algorithm."""


@runtime_checkable
class OnPairs(Protocol):
    """An algorithm that learns from pairs of responses to one prompt, the better one first. `[P]` is of P pairs."""

    needs: Needs
    """What has to be there, by the settings."""
    mean: bool
    """Whether a response's log-probability is the mean over its tokens, and not their sum."""

    def losses(self, chosen: Tensor, rejected: Tensor) -> PairLosses:
        """The losses of a micro-batch.

        Args:
            chosen: `logp - ref_logp` of the better responses, `[P]`, nats, with gradient; `logp` alone without a reference.
            rejected: The same of the worse ones.
        """


class OnLabelled(Protocol):
    """An algorithm that learns from single responses that somebody called good or bad. `[P]` is of P responses."""

    needs: Needs
    """What has to be there, by the settings."""

    def losses(self, log_ratios: Tensor, desirable: Tensor, mismatched: Tensor) -> ResponseLosses:
        """The losses of a micro-batch.

        Args:
            log_ratios: `logp - ref_logp` of the responses, sums over their tokens, `[P]`, nats, with gradient; `logp` alone
                without a reference.
            desirable: Which were called good, `[P]`, boolean.
            mismatched: Log ratios of the whole minibatch's prompts with responses to others, without gradient.
        """


AnyAlgorithm = OnPolicy | OnPairs | OnLabelled
M = TypeVar("M", bound=Callable[..., AnyAlgorithm])
_FOUND: dict[str, Entry] = {}

LearnsFrom = Literal["rollouts", "preferences", "labels"]
"""What a batch is made of: the run's own scored rollouts, or judgements of the preference service: those that order two
responses, or those that call one good or bad."""


_OF_SCORES: Final = frozenset({"kl", "importance_cap", "max_ratio", "reward_clip", "reward_normalisation"})
OF_VALUES: Final = ("value_coefficient", "critic", "critic_learning_rate")
"""Settings that algorithms read which learn what states are worth."""
_OF_SOME: Final = _OF_SCORES | {"clip_ratio", "clip_value", "gamma", "lam", *OF_VALUES}
"""Settings of the section `learner` that some algorithms read and others do not."""


@dataclass(frozen=True)
class Entry:
    """An algorithm that is known.

    Attributes:
        options: The class of what `learner.options` may hold.
        make: Takes the section `learner`, and options of that class.
        learns_from: What a batch is made of.
        reads: Which of the numbers that not all read it reads.
        epochs: Passes over a batch where `learner.epochs` does not say.
    """

    options: type[Section]
    make: Callable[[LearnerSettings, Any], AnyAlgorithm]
    learns_from: LearnsFrom
    reads: frozenset[str]
    epochs: int

    @property
    def unread(self) -> frozenset[str]:
        """Settings of the section `learner` that mean nothing to it."""
        of_source = "preferences" if self.learns_from == "rollouts" else "max_staleness"
        return (_OF_SOME - self.reads) | {of_source}


def algorithm(
    name: str,
    options: type[Section],
    *,
    learns_from: LearnsFrom = "rollouts",
    reads: Sequence[str] = (),
    ignores: Sequence[str] = (),
    epochs: int = 1,
) -> Callable[[M], M]:
    """Makes a class known under a name, which must be its file's; see `Entry` for the rest.

    One that learns from rollouts is `OnPolicy`, or `OnPairs` of the best and the worst response to each prompt; one that learns
    from preferences is `OnPairs`, one that learns from labels `OnLabelled`.

    An `OnPolicy` one reads the settings of KL, rewards and behaviour weights without naming them, but not those that it
    `ignores`.
    """

    def register(make: M) -> M:
        scored = _OF_SCORES if OnPolicy in getattr(make, "__mro__", ()) else frozenset()
        _FOUND[name] = Entry(options, make, learns_from, (scored - set(ignores)) | frozenset(reads), epochs)
        return make

    return register


def algorithm_names() -> list[str]:
    """The names that `learner.algorithm` may have."""
    package = importlib.import_module("honed.learner.algorithms")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base")


def find_algorithm(name: str) -> Entry:
    """The algorithm of a name.

    Raises:
        InvalidArgument: There is none.
    """
    names = algorithm_names()
    if name not in names:
        raise InvalidArgument("learner.algorithm", f"there is no {name!r}; there are {', '.join(names)}")
    importlib.import_module(f"honed.learner.algorithms.{name}")
    return _FOUND[name]


def make_algorithm(learner: LearnerSettings) -> AnyAlgorithm:
    """The algorithm of the settings.

    Raises:
        InvalidArgument: There is none of this name, or it cannot have these options.
    """
    return find_algorithm(learner.algorithm).make(learner, options_of(learner.algorithm, learner.options))


def options_of(name: str, given: Mapping[str, Any]) -> Section:
    """The options of an algorithm.

    Raises:
        InvalidArgument: It has not such an option, or the value cannot be.
    """
    return read_options(find_algorithm(name).options, given, field="learner.options", owner=name)
