"""A value that is read from files, and read again when one of them is replaced: certificates, token tables."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

_Signature = tuple[tuple[int, int, int] | None, ...]


class FromFiles(Generic[Value]):
    """Holds the value of the files as they are now. Each `get` costs one stat a file.

    A file that cannot be read any more, or that is broken, is logged once, and the value before it
    stays: half of a rotation must not stop a service.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], Value]) -> None:
        """Reads the value for the first time.

        Args:
            paths: the files.
            read: makes the value from them; raises ValueError when it cannot.

        Raises:
            ValueError: from `read`.
        """
        self._paths = tuple(paths)
        self._read = read
        # Before the reading: what is replaced in between is read again at the next `get`.
        self._signature = self._look()
        self._value = read()

    def get(self) -> Value:
        """The value; the same object as long as no file changed."""
        signature = self._look()
        if signature != self._signature:
            self._signature = signature
            try:
                self._value = self._read()
            except ValueError as error:
                logger.error("a changed file cannot be used; what it held before stays", extra={"reason": str(error)})  # noqa: TRY400  # the reason says it
            else:
                logger.info("read changed files again", extra={"files": [str(path) for path in self._paths]})
        return self._value

    def _look(self) -> _Signature:
        return tuple(_signature(path) for path in self._paths)


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
