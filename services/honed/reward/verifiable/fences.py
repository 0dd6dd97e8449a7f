"""Fenced blocks of Markdown (CommonMark 4.5), as models write code: three backticks or tildes, and maybe a language."""

from __future__ import annotations

from collections.abc import Collection, Iterator


def fenced_blocks(text: str, languages: Collection[str]) -> list[str]:
    """The blocks in one of the languages, in their order; those without a language if there are none such.

    A block that is not closed ends with the text: a response may have been cut.
    """
    blocks = list(_blocks(text))
    named = [body for language, body in blocks if language in languages]
    return named or [body for language, body in blocks if not language]


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    fence, language = "", ""
    body: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if not fence:
            if stripped.startswith(("```", "~~~")):
                fence = stripped[: len(stripped) - len(stripped.lstrip(stripped[0]))]
                language = stripped[len(fence) :].strip().partition(" ")[0].lower()
                body = []
        elif stripped.startswith(fence) and not stripped.strip(fence[0]):
            yield language, "\n".join(body)
            fence = ""
        else:
            body.append(line)
    if fence:
        yield language, "\n".join(body)
