"""Whether somebody has paused the learner: a file, so that a restart does not undo it."""

from __future__ import annotations

from pathlib import Path


class PauseFile:
    """The file is there while the learner is paused."""

    def __init__(self, directory: Path) -> None:
        """`directory` is the learner's."""
        self._path = directory / "paused"

    def __bool__(self) -> bool:
        return self._path.exists()

    def set(self, paused: bool) -> None:
        """Pauses, or ends a pause."""
        if paused:
            self._path.touch()
        else:
            self._path.unlink(missing_ok=True)
