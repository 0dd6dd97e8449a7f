"""Keys under which the preference service freezes judgements: the same again after a restart, never those of another life."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from honed.kit.errors import Unavailable
from honed.kit.files import sync


class SnapshotKeys:
    """Makes keys that begin with a name which is kept in the learner's directory.

    A learner that resumes finds it there, and gets the snapshots again that it had. A run that begins anew, one whose directory
    is lost, and another run of the same name on the same database have names of their own: they must not get theirs.
    """

    def __init__(self, file: Path, run: str) -> None:
        """`file` is made when the first key is."""
        self._file, self._run = file, run

    def key(self, place: str) -> str:
        """The key of a place in the run. Blocks.

        Raises:
            Unavailable: The name cannot be read or kept.
        """
        try:
            name = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        except OSError as error:
            raise Unavailable(f"{self._file} cannot be read: {error.strerror}") from error
        return f"{self._run}/learner/{name or self.renew()}/{place}"

    def renew(self) -> str:
        """Has all keys be others from now on, and returns their name: what is frozen under those before is of no use. Blocks.

        Raises:
            Unavailable: The name cannot be kept.
        """
        # Short: a key may have 128 characters, and a run's name has up to 64 of them.
        name, partial = secrets.token_hex(8), self._file.with_suffix(".partial")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(name, encoding="utf-8")
            sync(partial)  # or a cut of power may leave the file empty under its own name
            os.replace(partial, self._file)
            sync(self._file.parent)
        except OSError as error:
            raise Unavailable(f"{self._file} cannot be written: {error.strerror}") from error
        return name
