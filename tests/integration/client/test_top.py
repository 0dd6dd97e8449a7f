"""Claims about `honed top` on a run of this machine: what it shows comes from the services themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import start_http_server
from tests.integration.client import served, top_served
from typer.testing import CliRunner

from honed.cli.main import app
from honed.reward.metrics import QUEUED, TOKENS_PER_SECOND
from honed.v1 import conductor_pb2


@dataclass
class Shown:
    directory: Path

    def top(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["top", "--once", *arguments, "--run", str(self.directory)])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Shown]:
    tokens, loop = served.make_tokens(tmp_path), served.Loop()
    metrics, serving = start_http_server(0, "127.0.0.1")
    try:
        generators = [loop.serve(top_served.Generation().servicer(), tokens) for _ in range(2)]
        reward = loop.serve(top_served.Reward().servicer(), tokens)
        processes = [
            conductor_pb2.ProcessStatus(name=f"generation-{number}", healthy=True, address=address, version="1.5")
            for number, address in enumerate(generators)
        ]
        processes += [
            conductor_pb2.ProcessStatus(name="generation-2", last_exit="killed by SIGKILL"),
            conductor_pb2.ProcessStatus(name="reward-0", healthy=True, address=reward, metrics_port=metrics.server_port),
            conductor_pb2.ProcessStatus(name="reward-1", healthy=True, address="127.0.0.1:1"),
        ]
        addresses = {
            "generation": generators[0],
            "learner": loop.serve(top_served.Learner().servicer(), tokens),
            "conductor": loop.serve(top_served.Conductor(processes).servicer(), tokens),
        }
        served.announce(tmp_path, **addresses)
        yield Shown(tmp_path)
    finally:
        loop.close()
        metrics.shutdown()
        metrics.server_close()
        serving.join(10)


def test_each_replica_speaks_for_itself(run: Shown) -> None:
    QUEUED.set(3)
    TOKENS_PER_SECOND.set(1234.0)
    tree = json.loads(run.top("--json").stdout)
    rows = {row["name"]: row for row in tree["replicas"]}
    for name in ("generation-0", "generation-1"):
        row = rows[name]
        assert (row["version"], row["in_flight"], row["training_in_flight"], row["waiting"]) == ("1.5", 9, 6, 2)
        assert row["pause_p95_ms"] == pytest.approx(23)
        assert 20 < row["tokens_per_second"] < 205, "a hundred or two between two looks, a second or more apart"
    assert (rows["generation-2"]["ready"], rows["generation-2"]["error"]) == (False, "killed by SIGKILL")
    assert (rows["reward-0"]["waiting"], rows["reward-0"]["tokens_per_second"]) == (3, 1234.0)
    assert rows["reward-0"]["version"] == "people 0123abcd"
    assert "did not answer" in rows["reward-1"]["error"]
    learner = tree["learner"]
    assert (learner["staleness_mean"], learner["staleness_max"], learner["kl"], learner["score_mean"]) == (1.25, 2, 3.5, None)
    assert learner["updates_per_minute"] == pytest.approx(6, abs=0.1)
    assert tree["run"]["queue_depth"] == {"scored": 7}
    assert "processes" not in tree["run"]


def test_a_person_sees_the_same(run: Shown) -> None:
    shown = run.top().stdout
    for part in (
        "ppo, 12%",
        "7 scored; 1500 prompts admitted",
        "6.00 updates a minute; staleness 1.25 in the mean, 2 at most",
        "! generation-1: it samples for too long",
        "23 ms",
        "killed by SIGKILL",
    ):
        assert part in shown


def test_a_learner_that_is_away_leaves_its_reason(run: Shown) -> None:
    endpoints = json.loads((run.directory / "endpoints.json").read_text())
    served.announce(run.directory, **{**endpoints, "learner": "127.0.0.1:1"})
    done = run.top()
    assert done.exit_code == 0
    assert "learner service at 127.0.0.1:1 did not answer" in done.stdout
    assert "generation-1" in done.stdout
