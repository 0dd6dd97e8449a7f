"""The steps of a trial on a real cluster, and what was seen."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from honed._client.errors import RequestError
from honed.cluster.api import Cluster
from honed.cluster.run import ClusterRun
from honed.kit.errors import HonedError
from honed.v1 import conductor_pb2, conductor_pb2_grpc, learner_pb2, learner_pb2_grpc
from loadtest.kubectl import Kubectl, until
from loadtest.soak import unaccounted

VERSIONS = 10
START_TIMEOUT_S = 1800.0
READY_TIMEOUT_S = 600.0
DELETE_EVERY_S = 30.0
WORKLOADS = (
    "deployment/honed-generation",
    "deployment/honed-reward",
    "deployment/honed-preference",
    "statefulset/honed-learner",
    "deployment/honed-conductor",
    "statefulset/honed-redis",
)
COMPONENTS = ("generation", "reward", "preference", "learner", "conductor", "redis")


class Trial:
    """The steps, and what was seen."""

    def __init__(self, kubectl: Kubectl, rng: random.Random) -> None:
        """Asks nothing yet."""
        self.kubectl, self._rng = kubectl, rng
        self.run = ClusterRun(Cluster.of(kubectl.cluster))
        self.seen: dict[str, Any] = {"missed": []}
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Tells how far it is."""
        print(f"{time.monotonic() - self._started:5.0f} s  {text}", file=sys.stderr, flush=True)

    def miss(self, text: str) -> None:
        """Notes what does not hold, and goes on."""
        self.say(f"MISSED: {text}")
        self.seen["missed"].append(text)

    def status(self) -> learner_pb2.GetStatusResponse | None:
        """Where the learner stands; None while nobody answers."""
        try:
            self.run.look_again()
            with self.run.peer("learner") as peer:
                method = learner_pb2_grpc.LearnerServiceStub(peer.channel).GetStatus
                return peer.unary(method, learner_pb2.GetStatusRequest(), 20.0)
        except (HonedError, RequestError):
            return None

    def updates(self) -> int:
        """The learner's last update; -1 while nobody answers."""
        found = self.status()
        return found.version.step if found is not None else -1

    def start(self, overlay: Path) -> None:
        """Applies the overlay, and waits for ten versions.

        Raises:
            TimeoutError: they do not come.
            RuntimeError: the API server refuses something.
        """
        self.kubectl.apply_overlay(overlay)
        applied = time.monotonic()
        self.say("applied")
        shown = ""

        def pushed() -> bool:
            nonlocal shown
            pods = self.kubectl("get", "pods", "--no-headers").splitlines()
            now = ", ".join(" ".join(line.split()[:3]) for line in pods)
            if now != shown:
                shown = now
                self.say(now)
            return self.updates() >= VERSIONS

        until(pushed, START_TIMEOUT_S, f"{VERSIONS} versions", every_s=5)
        self.seen["seconds_to_ten_versions"] = round(time.monotonic() - applied)

    def commands(self, directory: Path) -> None:
        """Runs what people use, as they would."""
        judgements = directory / "judgements.jsonl"
        line = {"prompt": "the film is", "chosen": "great", "rejected": "bad"}
        judgements.write_text(json.dumps(line) + "\n")
        expected = (
            (("generate", "the film is", "--n", "2", "--json"), "token_ids"),
            (("score", "a good film", "--json"), "human-preference"),
            (("status", "--json"), "versions_pushed"),
            (("versions", "list", "--json"), "manifest_sha256"),
            (("judge", "import", str(judgements), "--format", "trl", "--source", "trial", "--json"), "1"),
            (("judge", "stats", "--json"), "trial"),
        )
        for arguments, word in expected:
            command = [sys.executable, "-m", "honed.cli.main", "--cluster", self.kubectl.cluster, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
            if done.returncode != 0 or word not in done.stdout:
                self.miss(f"honed --cluster {' '.join(arguments)}: exit status {done.returncode}: {done.stdout}{done.stderr}")
            else:
                self.say(f"honed --cluster {' '.join(arguments[:2])}: {done.stdout.strip()[:120]}")

    def delete_at_random(self, seconds: float) -> None:
        """Deletes a pod every half minute.

        A generator goes in order, and only while another is ready; everyone else half of the times at once.
        """
        end, deleted = time.monotonic() + seconds, Counter[str]()
        while time.monotonic() < end:
            self.run.look_again()
            with contextlib.suppress(HonedError, RuntimeError):
                component = self._rng.choice(COMPONENTS)
                ready = [pod for pod in self.run.pods if pod.component == component and pod.ready]
                if len(ready) > (component == "generation"):
                    pod = self._rng.choice(ready).name
                    at_once = component != "generation" and self._rng.random() < 0.5
                    self.kubectl("delete", "pod", pod, "--wait=false", *(["--grace-period=1"] if at_once else []))
                    deleted[component] += 1
                    self.say(f"deleted {pod}{' at once' if at_once else ''}; update {self.updates()}")
            time.sleep(min(DELETE_EVERY_S, max(0.0, end - time.monotonic())))
        self.seen["deleted"] = dict(deleted)

    def restart_each(self) -> None:
        """Restarts each workload, one after the other."""
        self.ready()
        for workload in WORKLOADS:
            began = time.monotonic()
            self.kubectl("rollout", "restart", workload)
            try:
                self.kubectl("rollout", "status", workload, f"--timeout={READY_TIMEOUT_S:g}s", timeout_s=READY_TIMEOUT_S + 30)
            except RuntimeError as error:
                self.miss(str(error))
            self.say(f"restarted {workload} in {time.monotonic() - began:.0f} s; update {self.updates()}")

    def ready(self) -> None:
        """Waits until every workload has what it wants.

        Raises:
            TimeoutError: one has not.
        """
        for workload in WORKLOADS:
            self.kubectl("rollout", "status", workload, f"--timeout={READY_TIMEOUT_S:g}s", timeout_s=READY_TIMEOUT_S + 30)

    def trains_on(self, updates: int = 5) -> None:
        """Waits until training has gone on.

        Raises:
            TimeoutError: it does not.
        """
        goal = 0

        def gone_on() -> bool:
            nonlocal goal
            now = self.updates()
            goal = goal or (now + updates if now >= 0 else 0)
            return bool(goal) and now >= goal

        until(gone_on, READY_TIMEOUT_S, f"{updates} further updates")

    def account(self) -> None:
        """What became of every rollout."""
        ids, steps = Counter[str](), list[int]()
        accounts: dict[str, int] = {}

        def read() -> bool:
            ids.clear()
            steps.clear()
            with self.run.peer("learner") as peer:
                method = learner_pb2_grpc.LearnerServiceStub(peer.channel).WatchMetrics
                request = learner_pb2.WatchMetricsRequest(no_follow=True, with_rollouts=True)
                for answer in peer.stream(method, request, 120.0):
                    steps.append(int(answer.metrics.step))
                    ids.update(answer.metrics.rollout_ids)
            return True

        until(read, 300, "the learner tells of every update")

        def agree() -> bool:
            with self.run.peer("conductor") as conductor:
                method = conductor_pb2_grpc.ConductorServiceStub(conductor.channel).GetRun
                found = conductor.unary(method, conductor_pb2.GetRunRequest(), 20.0).run
            accounts.update(found.accounts)
            return bool(accounts) and unaccounted(accounts, 0) == 0

        with contextlib.suppress(TimeoutError):
            until(agree, 60, "the counters agree", every_s=0.2)
        twice, lost = sum(1 for count in ids.values() if count > 1), unaccounted(accounts, 0)
        self.seen |= {
            "updates": len(steps),
            "rollouts_trained": ids.total(),
            "twice": twice,
            "accounts": accounts,
            "lost": lost,
        }
        if steps != list(range(1, len(steps) + 1)):
            self.miss("updates are missing or out of order")
        if twice:
            self.miss(f"{twice} rollouts were trained twice")
        if lost:
            self.miss(f"{lost} rollouts are not accounted for")
