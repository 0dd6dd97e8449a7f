"""What data that the package makes consists of, and how it is found by the name in `data.made`.

An entry is one file of this package with the entry's name. A run file is read without what an entry imports to make its files
and to measure: that stands inside of its methods.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from honed.conductor.settings import DataSettings, EvaluationSettings
from honed.kit.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:  # the tree itself asks here
    from honed.conductor.sampling import Continuation
    from honed.config import RunSettings

_PACKAGE: Final = "honed.recipes.made"
_STAMP: Final = "made.json"
DIRECTORY: Final = "data"
"""Under a run's directory: where its data is made."""


@dataclass(frozen=True)
class Sampled:
    """What the policy made of the held-out prompts, with the same seeds before and after training.

    Attributes:
        before: Continuations by the base policy, in the order of the file.
        after: By the trained policy.
        rewards_before: What the run's scorers say of `before`; empty where no scorer is named.
        rewards_after: And of `after`.
    """

    before: Sequence[Continuation]
    after: Sequence[Continuation]
    rewards_before: Sequence[float]
    rewards_after: Sequence[float]

    def mean_rewards(self) -> tuple[float, float]:
        """The mean reward before and after.

        Raises:
            FailedPrecondition: There are none.
        """
        if not self.rewards_before or not self.rewards_after:
            raise FailedPrecondition("the continuations of the held-out prompts have no rewards: name a scorer")
        return fmean(self.rewards_before), fmean(self.rewards_after)


@dataclass(frozen=True)
class Change:
    """A figure before and after training.

    Attributes:
        figure: Its name, with its range or unit.
        before: Of the base policy.
        after: Of the trained one.
    """

    figure: str
    before: float
    after: float


class MadeData(ABC):
    """One entry."""

    title: ClassVar[str]
    """What it is, in a line."""
    sources: ClassVar[Collection[str]] = ()
    """Sources of judgements that are made with it: they can be made again, and go with a fresh run."""
    prose: ClassVar[bool] = True
    """Whether responses are running text, so that it says something how many different word pairs there are."""

    @abstractmethod
    def files(self, directory: Path) -> DataSettings:
        """The `data` section that names the files which `write` makes in a directory."""

    @abstractmethod
    def write(self, directory: Path, seed: int) -> None:
        """Writes the files. Those that are there may stay. Blocks.

        Raises:
            HonedError: What they are made of cannot be had; says what to do.
        """

    def held_out_texts(self, seed: int) -> Sequence[str]:
        """Texts that people wrote and nothing trained on: they measure what a policy forgets. None by default."""
        return ()

    @abstractmethod
    def measure(self, sampled: Sampled, seed: int) -> Sequence[Change]:
        """What the run has changed; the first is the figure that the recipe is about.

        Raises:
            FailedPrecondition: It cannot be measured.
        """


M = TypeVar("M", bound=type[MadeData])
_FOUND: dict[str, MadeData] = {}


def made(name: str) -> Callable[[M], M]:
    """Makes a class known under a name, which must be its file's."""

    def register(entry: M) -> M:
        _FOUND[name] = entry()
        return entry

    return register


def made_names() -> list[str]:
    """The names that `data.made` may have."""
    package = importlib.import_module(_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base")


def find_made(name: str) -> MadeData:
    """The entry of a name.

    Raises:
        InvalidArgument: There is none.
    """
    names = made_names()
    if name not in names:
        raise InvalidArgument("data.made", f"there is no {name!r}; there are {', '.join(names)}")
    importlib.import_module(f"{_PACKAGE}.{name}")
    return _FOUND[name]


def texts_and_prompts(directory: Path, held_out: int) -> DataSettings:
    """The `data` section of texts to pretrain on, prompts, and so many held-out prompts: the files of these names."""
    return DataSettings(
        texts=(directory / "texts.jsonl",),
        prompts=directory / "prompts.jsonl",
        evaluation=EvaluationSettings(prompts=directory / "evaluation.jsonl", samples=held_out),
    )


def with_made_files(tree: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The tree of a run file in which `data.made` has named its files, beside those that the file names itself.

    Args:
        tree: Of the run file.
        directory: Of the run.

    Raises:
        ValueError: There is no such data.
    """
    data = tree.get("data")
    if isinstance(data, DataSettings):
        data = data.model_dump(exclude_unset=True)
    if not isinstance(data, Mapping) or not isinstance(data.get("made"), str):
        return dict(tree)
    try:
        files = find_made(data["made"]).files(directory / DIRECTORY)
    except InvalidArgument as error:
        raise ValueError(str(error)) from None
    return {**tree, "data": _filled(data, files.model_dump(exclude_defaults=True))}


def make_data(settings: RunSettings) -> None:
    """Writes the files of `data.made`; nothing where it is not set. Blocks.

    Raises:
        FailedPrecondition: The directory holds other data, or the same by another seed.
        HonedError: What it is made of cannot be had.
    """
    name = settings.data.made
    if name is None:
        return
    directory = settings.directory / DIRECTORY
    stamp, wanted = directory / _STAMP, {"made": name, "seed": settings.seed}
    if stamp.exists() and (found := json.loads(stamp.read_text(encoding="utf-8"))) != wanted:
        raise FailedPrecondition(
            f"{directory} holds {found.get('made')} of seed {found.get('seed')}, and the run wants {name} of seed "
            f"{settings.seed}: choose another `directory`, or remove that one"
        )
    directory.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(wanted) + "\n", encoding="utf-8")  # first: files of another seed must not join those of this
    find_made(name).write(directory, settings.seed)


def awaited_files(settings: RunSettings) -> set[Path]:
    """The files of `data.made` that are not there yet, and that the run makes at its start."""
    if settings.data.made is None:
        return set()
    files = find_made(settings.data.made).files(settings.directory / DIRECTORY)
    return {path for path in _paths(files.model_dump()) if not path.exists()}


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _paths(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _paths(part)


def _filled(given: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with what it lacks from `below`."""
    filled = {**below, **given}
    for key, value in below.items():
        if isinstance(value, Mapping) and isinstance(given.get(key), Mapping):
            filled[key] = _filled(given[key], value)
    return filled
