"""A run as a cluster has it: each service on a machine of its own, which is a working directory.

The run file and every path in it are relative, so that services share `policy.url`, `queue.url` and a copy of the tokens, and
nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.run import merged

from honed.cli.connection import open_peer
from honed.cli.status import look
from honed.client import RequestError
from honed.queue.embedded import free_port


def machine_tree(run: str, store: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """The one run file of all machines, with what a test changes merged into its sections.

    Paths of model and prompts lead somewhere on one machine each. Every service has a free port of its own.
    """
    tree: dict[str, Any] = {
        "run": run,
        "directory": "run",
        "seed": 7,
        "security": {"tokens": "tokens"},
        "queue": {"lease_s": 3.0},
        "policy": {"url": f"file://{store}", "keep": 1000},
        "generation": {
            "engine": "transformers", "max_model_tokens": 128, "max_prompt_tokens": 32, "max_tokens": 96,
            "rollout_concurrency": 16, "port": free_port(), "control_port": free_port(),
        },
        "reward": {"scorers": [{"name": "words", "kind": "function", "source": "length"}], "port": free_port()},
        "preference": {"port": free_port()},
        "learner": {"batch": 8, "epochs": 1, "max_staleness": 2, "port": free_port()},
        "conductor": {
            "launcher": "none", "start_from": "model", "response_tokens": 12, "fixed_length": True, "port": free_port(),
        },
        "data": {"prompts": "prompts.jsonl"},
    }  # fmt: skip
    return merged(tree, sections)


@dataclass
class Machine:
    """A host of one service."""

    name: str
    root: Path
    variables: Mapping[str, str]
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def run(self) -> Path:
        return self.root / "run"

    async def start(self, service: str) -> asyncio.subprocess.Process:
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "honed.cli.main", "serve", service, "--run-file", "run.yaml"),
                env=self.variables,
                cwd=self.root,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    async def ended(self, *arguments: str) -> tuple[int, str]:
        """Runs a command to its end; its exit status and what it printed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "honed.cli.main", *arguments),
            env=self.variables,
            cwd=self.root,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        text, _ = await process.communicate()
        return process.returncode or 0, text.decode()

    def status(self) -> dict[str, Any]:
        """What `honed status` shows on this machine; empty while nobody answers."""
        try:
            with contextlib.ExitStack() as stack:
                names = ("conductor", "learner", "generation")
                return look({name: stack.enter_context(open_peer(name, self.run, None, None)) for name in names})
        except (ValueError, RequestError):
            return {}
