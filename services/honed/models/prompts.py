"""The one reader of prompts: a row or a message of the contract as token ids of a model, without torch.

The check, the conductor and the reward-model job read prompts through it, so that none takes what another refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from honed.kit.errors import DataLoss, InvalidArgument
from honed.models.chat import ChatMessage, ChatTemplate
from honed.models.prompt_rows import check_row
from honed.v1 import generation_pb2

Messages = Sequence[Mapping[str, str]]
Render = Callable[[Messages], list[int]]
"""Token ids of a conversation, by the model's chat template."""


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory.

    Raises:
        DataLoss: `tokenizer.json` is missing or damaged.
    """
    path = directory / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise DataLoss(f"{path} cannot be read: {error}") from error


def render_messages(template: ChatTemplate | None, messages: Messages) -> str:
    """A conversation of a row as text; keys beside `role` and `content` are not the template's business.

    Raises:
        InvalidArgument: the model has no chat template, or it refuses the messages.
    """
    if template is None:
        raise InvalidArgument("messages", "the model has no chat template: give `text` or `token_ids`")
    return template.render([ChatMessage(message["role"], message["content"]) for message in messages])


class PromptEncoder:
    """Token ids of a prompt, by the run's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, *, longest: int, render: Render) -> None:
        """Of a model.

        Args:
            tokenizer: Of the policy.
            longest: Tokens that a prompt may have; the generator would refuse a longer one again and again.
            render: Makes token ids of a conversation.
        """
        self._tokenizer, self._longest, self._render = tokenizer, longest, render
        self._size = int(tokenizer.get_vocab_size())

    @classmethod
    def of_model(cls, directory: Path, *, longest: int) -> PromptEncoder:
        """By the files of a model directory: `tokenizer.json`, and a chat template if there is one.

        Raises:
            DataLoss: one of them is missing or damaged.
        """
        return cls.of_tokenizer(read_tokenizer(directory), ChatTemplate.read(directory), longest=longest)

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer, template: ChatTemplate | None, *, longest: int) -> PromptEncoder:
        """By a tokenizer and a chat template; messages are refused where there is none."""

        def render(messages: Messages) -> list[int]:
            # The template writes every special token itself.
            ids: list[int] = tokenizer.encode(render_messages(template, messages), add_special_tokens=False).ids
            return ids

        return cls(tokenizer, longest=longest, render=render)

    def __call__(self, row: dict[str, Any]) -> list[int]:
        """Token ids of a row with `text`, `token_ids` or `messages`.

        Raises:
            InvalidArgument: the row has none of them or more than one, or the prompt cannot be used.
        """
        kind = check_row(row)
        ids: list[int]
        if kind == "token_ids":
            ids = row["token_ids"]
        elif kind == "text":
            ids = self._tokenizer.encode(row["text"]).ids
        else:
            ids = self._render(row["messages"])
        if not ids or not all(type(token) is int and 0 <= token < self._size for token in ids):
            raise InvalidArgument(kind, f"must hold at least one token id, each from 0 to {self._size - 1}")
        if len(ids) > self._longest:
            raise InvalidArgument(
                kind,
                f"has {len(ids)} tokens; generation.max_prompt_tokens, and max_model_tokens less conductor.response_tokens, "
                f"leave room for {self._longest}: shorten it or raise them",
            )
        return ids

    def prompt(self, prompt: generation_pb2.Prompt) -> list[int]:
        """Token ids of a prompt of an RPC; raises as a row does."""
        match prompt.WhichOneof("content"):
            case "text":
                return self({"text": prompt.text})
            case "token_ids":
                return self({"token_ids": list(prompt.token_ids.ids)})
            case "messages":
                return self({"messages": [{"role": m.role, "content": m.content} for m in prompt.messages.messages]})
            case _:
                raise InvalidArgument("content", "needs `text`, `token_ids` or `messages`")
