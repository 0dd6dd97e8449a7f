"""The tokenizer of a model directory, and chat messages as its tokens."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from honed.artifacts.files import hash_file
from honed.kit.errors import DataLoss, InvalidArgument
from honed.models.chat import ChatMessage, ChatTemplate

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
"""Everything that makes a tokenizer; a directory has some of them, `tokenizer.json` always."""


class ChatTokenizer(Protocol):
    """What `render_chat` needs of a tokenizer."""

    @property
    def template(self) -> ChatTemplate | None:
        """Its chat template; None if the model has none."""

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        """Token ids of `text`, with or without what the tokenizer puts around a text."""


class TextTokenizer:
    """A tokenizer of transformers. Not for two threads at once."""

    def __init__(self, tokenizer: Any, *, digest: str = "", template: ChatTemplate | None = None) -> None:
        """Wraps a `PreTrainedTokenizerBase`; `load_tokenizer` gives one its digest and template.

        Args:
            tokenizer: Of transformers.
            digest: The sha256 of its `tokenizer.json`: two tokenizers of one digest give the same
                ids for the same text.
            template: Its chat template; None if it has none.
        """
        self._tokenizer = tokenizer
        self.digest = digest
        self.template = template
        self.prefix = tuple(self.encode("", special_tokens=True))
        """The special tokens in front of a text, such as the beginning of text; often none."""
        self.end: int | None = tokenizer.eos_token_id
        """The token that ends a text, or a turn of a chat model; None if there is none."""

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        """Token ids of `text`, with or without what the tokenizer puts around a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens, verbose=False)
        return ids

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of each text without special tokens; faster than one by one."""
        batch = list(texts)
        ids: list[list[int]] = self._tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"] if batch else []
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def load_tokenizer(directory: Path) -> TextTokenizer:
    """Loads the tokenizer of a model directory; no network, no code of the directory.

    Raises:
        DataLoss: It is missing or damaged.
    """
    digest = tokenizer_digest(directory)
    from honed.models import lean  # noqa: F401  here, because it imports torch; before transformers

    # isort: split
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises bare Exceptions for damaged files
        raise DataLoss(f"the tokenizer in {directory} cannot be loaded: {error}") from error
    return TextTokenizer(tokenizer, digest=digest, template=ChatTemplate.read(directory))


def tokenizer_digest(directory: Path) -> str:
    """The sha256 of the directory's `tokenizer.json`.

    Raises:
        DataLoss: There is none.
    """
    try:
        return hash_file(directory / "tokenizer.json")[1]
    except OSError as error:
        raise DataLoss(f"{directory} holds no readable tokenizer.json ({error.strerror})") from error


def render_chat(tokenizer: ChatTokenizer, messages: Sequence[ChatMessage], *, field: str = "messages") -> list[int]:
    """Token ids of a conversation, by the model's chat template, up to the assistant's answer.

    The template writes every special token itself, so none is added around its text.

    Args:
        tokenizer: The model's.
        messages: Oldest first.
        field: What the caller calls them, for errors.

    Raises:
        InvalidArgument: The model has no chat template, or it refuses the messages; names the
            field.
    """
    if tokenizer.template is None:
        raise InvalidArgument(
            field, "this model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): send text"
        )
    return tokenizer.encode(tokenizer.template.render(messages, field=field), special_tokens=False)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer files as they are: saving a loaded one would change its digest.

    Raises:
        InvalidArgument: `source` has none.
    """
    present = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not present:
        raise InvalidArgument("base", f"{source} holds no tokenizer files")
    for file in present:
        shutil.copyfile(file, target / file.name)
