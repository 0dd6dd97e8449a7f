"""The command `honed`: the command line, or what to install for it. The bare package brings a client library alone."""

from __future__ import annotations

import os
import signal
import sys

from honed.cli.missing import missing_package


def main() -> None:
    """Runs the command line of this process."""
    if os.getpid() == 1:
        # The kernel gives the first process of a container no default for SIGTERM: a command that does not stop by itself, or a
        # service that still loads, would be waited for until SIGKILL.
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    try:
        from honed.cli.main import main as run
    except ModuleNotFoundError as error:
        if not (advice := missing_package(error)):
            raise
        sys.exit(f"honed: {advice}")
    run()


if __name__ == "__main__":
    main()
