"""The policy's tokenizer, out of a model directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from honed.artifacts.files import hash_file
from honed.kit.errors import DataLoss


class HfCodec:
    """A Hugging Face tokenizer as a `TokenCodec`."""

    def __init__(self, directory: Path) -> None:
        """Loads the tokenizer of a model directory, from its files alone.

        Raises:
            DataLoss: It is missing or damaged.
        """
        self.digest = tokenizer_digest(directory)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library raises bare Exceptions for damaged files
            raise DataLoss(f"the tokenizer in {directory} cannot be loaded: {error}") from error
        self.prefix = tuple(self.encode("", special_tokens=True))

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        """Token ids of `text`, with or without what the tokenizer puts around a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens, verbose=False)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def tokenizer_digest(directory: Path) -> str:
    """The sha256 of the directory's `tokenizer.json`.

    Raises:
        DataLoss: There is none.
    """
    try:
        return hash_file(directory / "tokenizer.json")[1]
    except OSError as error:
        raise DataLoss(f"{directory} holds no readable tokenizer.json ({error.strerror})") from error
