"""The replicas of a run's services, one by one: their figures by RPC, and by `/metrics` where the RPC has none."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from honed.cli.connection import find_run

if TYPE_CHECKING:
    from honed._client.peer import Peer
    from honed.cluster.pods import Pod
    from honed.cluster.run import ClusterRun

SERVICES: Final = ("generation", "reward")
_TIMEOUT_S: Final = 5.0
_AT_ONCE: Final = 16


@dataclass(frozen=True)
class Replica:
    """One process of a service.

    Attributes:
        service: which one.
        name: of the process, or of the Pod.
        address: where it answers; empty before it does.
        ready: whether it serves.
        trouble: why it does not, where that is known.
        metrics: `host:port` of its `/metrics`; empty if it has none.
    """

    service: str
    name: str
    address: str
    ready: bool
    trouble: str = ""
    metrics: str = ""


class Replicas(Protocol):
    """Where a run's replicas are."""

    def list(self, processes: Iterable[Mapping[str, Any]]) -> list[Replica]:
        """The replicas now. `processes` are those that the conductor knows."""

    def peer(self, replica: Replica) -> Peer:
        """A connection to one of them; the same as long as it is there."""

    def metrics(self, replica: Replica) -> str:
        """Where its `/metrics` is reached from here, as `host:port`; empty if it has none."""


class AnnouncedReplicas:
    """Those that the conductor of a run knows by address."""

    def __init__(self, stack: ExitStack, run: Path | None, token_file: Path | None) -> None:
        """Connects to nothing yet; `stack` closes the connections.

        Raises:
            ValueError: no run is up, or the token cannot be read.
        """
        from honed._client.endpoints import Endpoints
        from honed.kit.tokens import read_token

        endpoints = Endpoints.read(find_run(run))
        file = token_file or endpoints.operator_token_file
        self._stack, self._tls = stack, endpoints.tls
        self._token = read_token(file) if file is not None else os.environ.get("HONED_TOKEN")
        self._peers: dict[str, Peer] = {}

    def list(self, processes: Iterable[Mapping[str, Any]]) -> list[Replica]:
        """See `Replicas`."""
        return [
            Replica(
                service,
                process["name"],
                process["address"],
                process["healthy"],
                "" if process["healthy"] else process["last_exit"],
                _at(process["address"], process["metrics_port"]),
            )
            for service in SERVICES
            for process in processes
            if process["name"].startswith(f"{service}-")
        ]

    def peer(self, replica: Replica) -> Peer:
        """See `Replicas`."""
        from honed._client.peer import Peer

        if replica.address not in self._peers:
            peer = Peer(replica.service, replica.address, self._token, self._tls)
            self._peers[replica.address] = self._stack.enter_context(peer)
        return self._peers[replica.address]

    def metrics(self, replica: Replica) -> str:
        """See `Replicas`."""
        return replica.metrics


class PodReplicas:
    """The Pods of a run on a cluster, each through a forwarded port of its own."""

    def __init__(self, stack: ExitStack, run: ClusterRun, token_file: Path | None) -> None:
        """Connects to nothing yet; `stack` closes the connections."""
        self._run, self._token_file = run, token_file
        self._open: dict[str, ExitStack] = {}
        self._peers: dict[str, Peer] = {}
        self._metrics: dict[str, str] = {}
        stack.callback(self._keep, ())

    def list(self, processes: Iterable[Mapping[str, Any]]) -> list[Replica]:
        """See `Replicas`. Connections are closed where a Pod is gone, or refused the token: it may be another one now."""
        from honed.cluster.pods import trouble_of

        pods = [pod for pod in self._run.pods if pod.component in SERVICES]
        refused = {name for name, peer in self._peers.items() if peer.refused}
        self._keep({pod.name for pod in pods if pod.ready} - refused)
        return [
            Replica(
                pod.component,
                pod.name,
                pod.address,
                pod.ready,
                "" if pod.ready else trouble_of(self._run.cluster, pod),
            )
            for pod in sorted(pods, key=lambda pod: (SERVICES.index(pod.component), pod.name))
        ]

    def peer(self, replica: Replica) -> Peer:
        """See `Replicas`."""
        if replica.name not in self._peers:
            pod = self._pod(replica)
            peer = self._run.peer(replica.service, self._token_file, pod)
            self._peers[pod.name] = self._stack(pod).enter_context(peer)
        return self._peers[replica.name]

    def metrics(self, replica: Replica) -> str:
        """See `Replicas`."""
        from honed.cluster.forward import Forward

        if replica.name not in self._metrics:
            pod = self._pod(replica)
            forward = Forward(self._run.cluster, replica.service, "metrics", [pod], pinned=True)
            self._metrics[pod.name] = self._stack(pod).enter_context(forward).address
        return self._metrics[replica.name]

    def _pod(self, replica: Replica) -> Pod:
        return next(pod for pod in self._run.pods if pod.name == replica.name)

    def _stack(self, pod: Pod) -> ExitStack:
        return self._open.setdefault(pod.name, ExitStack())

    def _keep(self, names: Iterable[str]) -> None:
        for name in self._open.keys() - set(names):
            self._open.pop(name).close()
            self._peers.pop(name, None)
            self._metrics.pop(name, None)


def figures(source: Replicas, replicas: list[Replica]) -> list[dict[str, Any]]:
    """What each replica says of itself, all asked at once. One that does not answer leaves its reason."""
    asked: dict[str, Callable[[Replicas, Replica], dict[str, Any]]] = {"generation": _generation, "reward": _reward}

    def ask(replica: Replica) -> dict[str, Any]:
        from honed.client import RequestError
        from honed.kit.errors import HonedError

        row = {"service": replica.service, "name": replica.name, "address": replica.address, "ready": replica.ready}
        if not replica.ready:
            return {**row, "error": replica.trouble or "it is not ready"}
        try:
            return {**row, **asked[replica.service](source, replica)}
        except (RequestError, HonedError, OSError) as error:
            return {**row, "error": str(error)}

    for replica in replicas:  # here, since one thread opens connections
        if replica.ready:
            source.peer(replica)
            source.metrics(replica)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(ask, replicas))


def _generation(source: Replicas, replica: Replica) -> dict[str, Any]:
    from honed.v1 import generation_pb2, generation_pb2_grpc

    peer = source.peer(replica)
    stub = generation_pb2_grpc.GenerationServiceStub(peer.channel)
    policy = peer.unary(stub.GetPolicy, generation_pb2.GetPolicyRequest(), _TIMEOUT_S)
    names = ("in_flight", "training_in_flight", "waiting", "draining", "samples_failed", "tokens_sampled")
    return {
        "version": f"{policy.version.fence}.{policy.version.step}",
        **{name: getattr(policy, name) for name in names},
        "pause_p95_ms": policy.pause_p95_seconds * 1e3,
    }


def _reward(source: Replicas, replica: Replica) -> dict[str, Any]:
    from honed.v1 import reward_pb2, reward_pb2_grpc

    peer = source.peer(replica)
    stub = reward_pb2_grpc.RewardServiceStub(peer.channel)
    listed = peer.unary(stub.ListScorers, reward_pb2.ListScorersRequest(), _TIMEOUT_S).scorers
    serving = [scorer for scorer in listed if scorer.state == reward_pb2.SCORER_STATE_SERVING]
    readable = ("function", "remote")  # the others have digests
    short = {scorer.name: scorer.version if scorer.kind in readable else scorer.version[:8] for scorer in serving}
    row: dict[str, Any] = {"version": ", ".join(f"{name} {version}" for name, version in short.items())}
    if at := source.metrics(replica):
        read = read_metrics(at)
        row["in_flight"] = int(sum(read("honed_grpc_calls_in_flight")))
        row["waiting"] = int(sum(read("honed_reward_queued_items")))
        row["tokens_per_second"] = sum(read("honed_reward_tokens_per_second"))
    return row


def read_metrics(at: str) -> Callable[[str], Iterator[float]]:
    """Reads `/metrics` at `host:port`; what it returns yields the samples of one name.

    Raises:
        OSError: it does not answer.
    """
    from prometheus_client.parser import text_string_to_metric_families

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a replica is behind no proxy
    with direct.open(f"http://{at}/metrics", timeout=_TIMEOUT_S) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return lambda name: (sample.value for sample in samples if sample.name == name)


def _at(address: str, port: int) -> str:
    from honed.kit.address import host_port

    host = address.removeprefix("dns:///").rpartition(":")[0]
    return host_port(host, port) if host and port else ""
