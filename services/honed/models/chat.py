"""Chat templates: a conversation as the text that a model was trained to continue.

Renders as transformers' `apply_chat_template` does, in the same sandbox and with the same
functions, and without importing torch: the conductor reads prompts that way. The template belongs
to the model, so a version of the policy carries it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from honed.kit.errors import DataLoss, InvalidArgument
from honed.models.facts import chat_template_source, read_json

_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message: who speaks, as the template names it, and what was said."""

    role: str
    content: str


class ChatTemplate:
    """One compiled template with the special tokens that it may name."""

    def __init__(
        self,
        source: str,
        special_tokens: dict[str, str],
        *,
        now: Callable[[], datetime] = datetime.now,
        origin: str = "template",
    ) -> None:
        """Compiles the template.

        Args:
            source: Jinja.
            special_tokens: Texts by name, such as `bos_token`.
            now: For templates that write today's date.
            origin: What to call it in errors.

        Raises:
            DataLoss: It is no valid template.
        """
        self._special = special_tokens
        self._now = now
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: self._now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataLoss(f"{origin}: the chat template is damaged: {error}") from error

    @classmethod
    def read(cls, directory: Path) -> ChatTemplate | None:
        """Of a model directory: chat_template.jinja, else that of tokenizer_config.json, else None.

        Raises:
            DataLoss: A file is damaged.
        """
        config_path, own = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        config = read_json(config_path) if config_path.is_file() else {}
        source = chat_template_source(directory)
        if source is None:
            return None
        tokens = directory / "special_tokens_map.json"
        special = {**(read_json(tokens) if tokens.is_file() else {}), **config}
        named = {name: text for name in _SPECIAL if (text := _token_text(special.get(name))) is not None}
        return cls(source, named, origin=str(own if own.is_file() else config_path))

    def render(self, messages: Sequence[ChatMessage], *, field: str = "messages") -> str:
        """The conversation as text, ending where the assistant's answer begins.

        Args:
            messages: Oldest first.
            field: What the caller calls them, for errors.

        Raises:
            InvalidArgument: There are none, or the template refuses or leaves out one of them;
                names the field.
        """
        if not messages:
            raise InvalidArgument(field, "is empty; send at least one message")
        rows = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._template.render(messages=rows, add_generation_prompt=True, tools=None, documents=None, **self._special)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message.role for message in messages)
            raise InvalidArgument(field, f"the model's chat template refuses them (roles: {roles}): {error}") from error
        for index, message in enumerate(messages):
            # Many templates drop what they do not know without a word. Some cut old answers on purpose, so those may differ.
            if message.role != "assistant" and message.content.strip() not in text:
                raise InvalidArgument(
                    f"{field}[{index}].role",
                    f"the model's chat template leaves this message out; it does not know the role {message.role!r}",
                )
        return text


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's words for training; rendering passes them on."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _token_text(token: object) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
