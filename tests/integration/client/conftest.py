"""A run's services, announced in a directory as a launcher would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.integration.client import served
from typer.testing import CliRunner

from honed.cli.main import app


@dataclass
class Run:
    directory: Path
    loop: served.Loop
    generation: served.Generation
    addresses: dict[str, str]

    @property
    def application_token(self) -> Path:
        return self.directory / "tokens" / "application.token"

    def honed(self, *arguments: str, stdin: str | None = None) -> Any:
        """Runs a command of the command line against this run."""
        return CliRunner().invoke(app, [*arguments, "--run", str(self.directory)], input=stdin)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    directory = tmp_path / "run"
    directory.mkdir()
    tokens = served.make_tokens(directory)
    loop = served.Loop()
    try:
        generation = served.Generation()
        servicers = {
            "generation": generation.servicer(),
            "reward": served.RewardByLength().servicer(),
            "preference": served.preference(loop, directory),
            "learner": served.Learner().servicer(),
            "conductor": served.Conductor().servicer(),
        }
        addresses = {name: loop.serve(servicer, tokens) for name, servicer in servicers.items()}
        served.announce(directory, **addresses)
        yield Run(directory, loop, generation, addresses)
    finally:
        loop.close()
