"""What happens to vLLM's engine process, and because of it, when processes die."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.contract.engines.conftest import make_engine
from tests.support.tiny import publish_version

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.generation.engine import InitialVersion
from honed.generation.requests import EngineRequest, Sampling
from honed.kit.errors import Unavailable

pytestmark = pytest.mark.vllm

SERVE = """
import asyncio, multiprocessing, sys
from pathlib import Path
from honed.generation.engine import InitialVersion
from honed.artifacts.version import VersionId
from tests.contract.engines.conftest import make_engine

async def main():
    engine = make_engine("vllm", InitialVersion(VersionId(1, 0), Path(sys.argv[1])))
    await engine.start()
    print("CHILDREN", *(child.pid for child in multiprocessing.active_children()), flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.fixture
def version(tmp_path: Path, models: list[Path]) -> Path:
    store = PolicyStore(tmp_path / "store", "test")
    publish_version(store, models[0], VersionId(1, 0))
    return store.fetch(VersionId(1, 0), tmp_path / "cache")


def engine_processes() -> set[int]:
    """The engines that this process started."""
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


async def test_a_dead_engine_process_is_noticed_and_every_request_is_told(version: Path) -> None:
    before = engine_processes()
    engine = make_engine("vllm", InitialVersion(VersionId(1, 0), version))
    await engine.start()
    try:
        (child,) = engine_processes() - before
        request = EngineRequest("one", [5, 6], Sampling(500, fixed_length=True))
        running = asyncio.create_task(engine.complete(request))
        await anext(engine.generate(EngineRequest("two", [5, 6], Sampling(500, fixed_length=True))))
        os.kill(child, signal.SIGKILL)
        async with asyncio.timeout(20):
            with pytest.raises(Unavailable):
                await running
            assert "engine process died" in await engine.wait_dead()
            with pytest.raises(Unavailable):
                await engine.complete(EngineRequest("three", [5], Sampling(4)))
    finally:
        await engine.close()
    assert engine_processes() == before


async def test_the_engine_process_does_not_outlive_a_killed_parent(version: Path, tmp_path: Path) -> None:
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["services", "."])}
    process = subprocess.Popen([sys.executable, script, version], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        line = await asyncio.to_thread(lambda: next(line for line in lines if line.startswith("CHILDREN")))
        children = [int(pid) for pid in line.split()[1:]]
        assert children
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    async with asyncio.timeout(20):
        while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in children):
            await asyncio.sleep(0.1)


async def test_a_start_that_is_given_up_ends_at_once_and_leaves_no_process(version: Path) -> None:
    before = engine_processes()
    engine = make_engine("vllm", InitialVersion(VersionId(1, 0), version))
    starting = asyncio.create_task(engine.start())
    async with asyncio.timeout(60):
        while engine_processes() <= before:  # there is nothing else to wait for
            await asyncio.sleep(0.05)
    for _ in range(2):  # a stop asks again after a while
        starting.cancel()
        await asyncio.sleep(0.1)
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.CancelledError):
            await starting
    assert engine_processes() <= before
    await engine.close()
