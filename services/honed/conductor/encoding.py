"""The encoder of a run's prompts: tokenizer and chat template of a model directory, without torch."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from honed.conductor.prompt_file import PromptEncoder
from honed.models.chat import ChatMessage, ChatTemplate


def prompt_encoder(directory: Path, longest: int) -> PromptEncoder:
    """An encoder by the files of a model directory.

    Args:
        directory: holds `tokenizer.json` and perhaps a chat template.
        longest: tokens that a prompt may have.

    Raises:
        DataLoss: the chat template is damaged.
    """
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    template = ChatTemplate.read(directory)

    def render(messages: list[dict[str, str]]) -> list[int]:
        assert template is not None
        text = template.render([ChatMessage(message["role"], message["content"]) for message in messages])
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return PromptEncoder(tokenizer, longest=longest, render=render if template else None)
