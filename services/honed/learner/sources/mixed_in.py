"""The examples that are mixed into updates: data.texts in blocks, or data.demonstrations, without end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from honed.config import RunSettings
from honed.kit.errors import InvalidArgument
from honed.learner.data.continuation import Demonstration
from honed.learner.settings import PretrainingMixSettings
from honed.learner.sources.epochs import Epochs, Position
from honed.learner.sources.files import read_demonstrations, read_texts
from honed.learner.sources.texts import Batch, demonstrations, packed_texts
from honed.models.tokenizer import load_tokenizer


class Endless:
    """Examples by number, epoch after epoch: whichever is asked for, the order of each epoch follows from the seed alone."""

    def __init__(self, source: Epochs[Batch]) -> None:
        """Takes a source without end, of batches of one example, that has equally many in each epoch."""
        self._source = source

    def __call__(self, first: int, count: int) -> Sequence[Demonstration]:
        """`count` examples from number `first` on."""
        found: list[Demonstration] = []
        self._source.go_to(Position(*divmod(first, self._source.batches)))
        while len(found) < count:
            found.extend(self._source.next() or ())
        return found


def examples_of(settings: RunSettings, mix: PretrainingMixSettings, model: Path) -> Endless:
    """The examples that the settings ask for.

    Args:
        settings: The run's.
        mix: What is mixed in.
        model: Directory of the base model.

    Raises:
        InvalidArgument: There are none, or not enough text for one block.
        ValueError: A file cannot be read, or a line not be used; names file and line.
    """
    return Endless(_texts(settings, mix, model) if mix.data == "texts" else _demonstrations(settings, model))


def _texts(settings: RunSettings, mix: PretrainingMixSettings, model: Path) -> Epochs[Batch]:
    tokenizer = load_tokenizer(model)
    separator = tokenizer.end if tokenizer.end is not None else next(iter(tokenizer.prefix), None)
    if separator is None:
        raise InvalidArgument("learner.ptx.data", "the tokenizer has no token between texts: mix in demonstrations")
    texts = tokenizer.encode_all(read_texts(settings.data.texts))
    return packed_texts(texts, separator=separator, width=mix.block_tokens, rows=1, seed=settings.seed)


def _demonstrations(settings: RunSettings, model: Path) -> Epochs[Batch]:
    items = read_demonstrations(
        settings.data.demonstrations,
        model,
        longest=settings.generation.max_model_tokens,
        append_end=settings.sft.append_end,
        setting="sft.append_end",
    )
    return demonstrations(list(items), rows=1, seed=settings.seed)
