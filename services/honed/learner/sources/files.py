"""The texts and the demonstrations that a run file names, as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from honed.kit.errors import InvalidArgument
from honed.kit.jsonl import read_lines
from honed.learner.data.continuation import Demonstration
from honed.models.prompt_rows import at_line, row_response
from honed.models.prompts import PromptEncoder
from honed.models.tokenizer import load_tokenizer


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The texts of `data.texts`.

    Raises:
        ValueError: A line cannot be used; names file and line.
    """
    return [str(row["text"]) for path in paths for _, row in read_lines(path)]


def read_demonstrations(
    paths: Sequence[Path], model: Path, *, longest: int, append_end: bool, setting: str
) -> Iterator[Demonstration]:
    """The demonstrations of `data.demonstrations`. A response that does not fit with its prompt loses its end.

    Args:
        paths: JSON lines.
        model: Directory with the tokenizer, and the chat template if prompts are conversations.
        longest: Tokens that prompt and response may have together.
        append_end: Whether a response ends with the end-of-text token.
        setting: Where that is set.

    Raises:
        InvalidArgument: The tokenizer has no token that ends a text.
        ValueError: A line cannot be used; names file and line.
    """
    encode, tokenizer = PromptEncoder.of_model(model, longest=longest - 1), load_tokenizer(model)
    tail: tuple[int, ...] = ()
    if append_end:
        if tokenizer.end is None:
            raise InvalidArgument(setting, "the tokenizer has no end-of-text token: set it to false")
        tail = (tokenizer.end,)
    for path in paths:
        for number, row in read_lines(path):
            try:
                prompt = encode(row)
                response = [*tokenizer.encode(row_response(row), special_tokens=False), *tail]
            except InvalidArgument as error:
                raise at_line(path, number, error) from error
            if response:
                yield Demonstration(prompt, response[: longest - len(prompt)])
