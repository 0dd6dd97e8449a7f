"""Training that fails does not end what serves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path

import pytest
from tests.support.run import environment, run_tree, until, write_run_file

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]


@pytest.mark.parametrize("exit_on_failure", [False, True])
async def test_a_failed_job_leaves_the_rest_serving_unless_asked_otherwise(tmp_path: Path, exit_on_failure: bool) -> None:
    file = write_run_file(tmp_path / "run.yaml", {**run_tree(tmp_path), "data": {"made": "walks"}})
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut off")
    log, run = tmp_path / "up.log", tmp_path / "run"
    more = ["--exit-on-failure"] if exit_on_failure else []
    with log.open("wb") as output:
        up = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "honed.cli.main", "up", str(file), "--no-check", *more),
            env=environment(),
            stdout=output,
            stderr=output,
        )
    try:
        async with asyncio.timeout(220):
            if not exit_on_failure:
                await until(lambda: "Training has failed" in log.read_text(), 60, "the reason is printed")
                asked = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "honed.cli.main", "judge", "stats", "--json", "--run", str(run)),
                    env=environment(),
                    stdout=asyncio.subprocess.PIPE,
                )
                text, _ = await asked.communicate()
                assert json.loads(text)["judgements"] == 0, "people can still give judgements"
                asked = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "honed.cli.main", "status", "--json", "--run", str(run)),
                    env=environment(),
                    stdout=asyncio.subprocess.PIPE,
                )
                text, _ = await asked.communicate()
                found = json.loads(text)["run"]
                assert found["phase"] == "failed"
                assert "training failed, serving goes on: pretrain failed" in found["alarms"][0]
                up.send_signal(signal.SIGINT)
            assert await up.wait() == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            up.kill()
        await up.wait()
    assert "pretrain failed" in log.read_text()
    assert (run / "data" / "prompts.jsonl").exists(), "data that honed makes was there before anything began"
