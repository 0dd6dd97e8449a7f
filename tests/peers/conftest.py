"""Our losses against the peers' own functions: `make test-peers`. Nothing here belongs to `make test`.

The peers stand in an environment of their own (`make peers`). Two releases of one package cannot be imported at once, so
`HONED_TEST_PEERS` says which of them are there, and a file of tests is collected where its peer is.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PEERS = os.environ.get("HONED_TEST_PEERS", "").split()
"""Which of `trl`, `trl_ppo` and `verl` can be imported."""

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Collects `test_PEER.py` where that peer is."""
    name = collection_path.stem
    return True if name.startswith("test_") and name.removeprefix("test_") not in PEERS else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the largest difference of each comparison."""
    if not PEERS:
        return
    # Not at the top: `make test` reads this file too, and need not wait for torch.
    from tests.peers.parity import table

    for line in table():
        terminalreporter.write_line(line)
