"""How much of a run a tracker has: a small file each, so that a conductor that was killed goes on where it was."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from honed.kit.rows import read_row
from honed.tracking.port import Mark

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """What was sent.

    Attributes:
        store: Where to.
        id: The tracker's own name of the run.
        sent: By series, the newest point that was sent.
    """

    store: str
    id: str | None = None
    sent: dict[str, Mark] = field(default_factory=dict)


class PositionFile:
    """The file of one tracker; whole at each moment."""

    def __init__(self, path: Path) -> None:
        """Reads nothing yet."""
        self._path = path

    def read(self, store: str) -> Position:
        """What was sent to a store; nothing if it was another, or the file is no such file."""
        try:
            found = read_row(Position, json.loads(self._path.read_text()))
            found.sent = {series: Mark(*mark) for series, mark in found.sent.items()}
        except FileNotFoundError:
            return Position(store)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("the run is tracked anew", extra={"file": str(self._path), "reason": str(error)})
            return Position(store)
        return found if found.store == store else Position(store)

    def write(self, position: Position) -> None:
        """Replaces the file.

        Raises:
            OSError: it cannot be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(position)))
        partial.replace(self._path)
