"""The command `honed`: the command line, or what to install for it. The bare package brings a client library alone."""

from __future__ import annotations

import sys

from honed.cli.missing import missing_package


def main() -> None:
    """Runs the command line of this process."""
    try:
        from honed.cli.main import main as run
    except ModuleNotFoundError as error:
        if not (advice := missing_package(error)):
            raise
        sys.exit(f"honed: {advice}")
    run()


if __name__ == "__main__":
    main()
