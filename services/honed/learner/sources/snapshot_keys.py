"""Keys under which the preference service freezes judgements: the same again after a restart, never those of another life."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


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
            OSError: The name cannot be read or kept.
        """
        if not self._file.exists():
            self.renew()
        return f"{self._run}/learner/{self._file.read_text(encoding='utf-8')}/{place}"

    def renew(self) -> None:
        """Has all keys be others from now on: what is frozen under those of before is of no use. Blocks.

        Raises:
            OSError: The name cannot be kept.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(uuid.uuid4().hex, encoding="utf-8")
        os.replace(partial, self._file)
