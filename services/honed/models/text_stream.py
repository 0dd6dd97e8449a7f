"""From sampled tokens to text, piece by piece: no half characters, and stop texts cut off before they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT = 5
"""Prompt tokens that the decoder sees before the first sampled one: some tokenizers decide on spaces by what stands before."""


class TextStream:
    """The text of one response."""

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int], stops: Sequence[str]) -> None:
        """`decode` is the tokenizer's."""
        self._decode = decode
        self._ids = list(prompt[-_CONTEXT:])
        self._stops = tuple(stops)
        self._shown = 0  # tokens up to here have become text
        self._base = len(self._ids)  # what the next tokens are decoded after
        self._text = ""
        self._sent = 0
        self.stopped = False

    def push(self, token_id: int) -> None:
        """Adds a sampled token. Sets `stopped` when a stop text is complete."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._shown : self._base])
        after = self._decode(self._ids[self._shown :])
        if len(after) > len(before) and not after.endswith("\ufffd"):
            self._append(after[len(before) :])
            self._shown, self._base = self._base, len(self._ids)

    def finish(self) -> None:
        """Takes what is left, half characters too."""
        if not self.stopped:
            before = self._decode(self._ids[self._shown : self._base])
            self._append(self._decode(self._ids[self._shown :])[len(before) :])
        self._stops = ()

    def take(self) -> str:
        """The text since the last call that can no longer become part of a stop text."""
        reserve = 0 if self.stopped else max((len(stop) - 1 for stop in self._stops), default=0)
        end = max(len(self._text) - reserve, self._sent)
        piece, self._sent = self._text[self._sent : end], end
        return piece

    def _append(self, piece: str) -> None:
        searched = len(self._text)
        self._text += piece
        found = [at for stop in self._stops if (at := self._text.find(stop, max(searched - len(stop) + 1, 0))) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True
