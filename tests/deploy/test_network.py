"""A model of the NetworkPolicies: who may talk to whom, compared with who does.

By the specification a connection is allowed if the source's policies let it out and the target's let it in; a pod that no
policy of a direction selects is open in it. Traffic between a pod and its own node is always allowed, so the kubelet is not in
the model.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.deploy.connections import API, CLIENTS, CONTROL, DNS, GRPC, HTTPS, MLFLOW, OF_OVERLAY, OTLP, Connection, recorded
from tests.deploy.manifests import DEPLOY, NAMESPACE, OVERLAYS, every_workload, of_kind, overlay, run_settings, selects

LABEL = "kubernetes.io/metadata.name"
PORTS = (DNS, HTTPS, OTLP, MLFLOW, 5432, 6379, API, 8081, 9000, 9090, GRPC, CONTROL)


@dataclass(frozen=True)
class Party:
    """Somebody who may open or take connections: a pod, or an address outside of the cluster."""

    name: str
    namespace: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str | None = None

    @property
    def own(self) -> bool:
        """Whether our policies speak of it."""
        return self.address is None and self.namespace.get(LABEL) == NAMESPACE


OUTSIDERS = (
    Party("dns", {LABEL: "kube-system"}, {"k8s-app": "kube-dns"}),
    Party("system", {LABEL: "kube-system"}, {"k8s-app": "other"}),
    Party("client", {LABEL: "shop", "honed.dev/client": "true"}, {"app": "shop"}),
    Party("stranger", {LABEL: "strangers"}, {"app.kubernetes.io/name": "honed", "app.kubernetes.io/component": "learner"}),
    Party("gateway", {LABEL: "gateways", "honed.dev/gateway": "true"}, {"app": "gateway"}),
    Party("monitoring", {LABEL: "monitoring"}, {"app": "prometheus"}),
    Party("mlflow", {LABEL: "mlflow"}, {"app": "mlflow"}),
    Party("keda", {LABEL: "keda"}, {"app.kubernetes.io/part-of": "keda-operator"}),
    Party("keda-other", {LABEL: "keda"}, {"app": "other"}),
    Party("intruder", {LABEL: NAMESPACE}, {"app": "intruder"}),
    Party("api-server", address="10.20.30.40"),
    Party("internet", address="203.0.113.7"),
    Party("metadata", address="169.254.169.254"),
)


def parties(name: str) -> list[Party]:
    own = {w.component: Party(w.component, {LABEL: NAMESPACE}, w.labels) for w in every_workload() if w.overlay == name}
    return [*own.values(), *OUTSIDERS]


def allowed(name: str) -> frozenset[Connection]:
    """Every connection that the policies of an overlay allow from or to one of its pods."""
    policies = [p["spec"] for p in of_kind(overlay(name), "NetworkPolicy")]
    found = set()
    for source, target in itertools.permutations(parties(name), 2):
        if source.address is not None or not (source.own or target.own):
            continue
        for port in PORTS:
            out = _lets(policies, source, target, port, "Egress") if source.own else True
            into = _lets(policies, target, source, port, "Ingress") if target.own else True
            if out and into:
                found.add(Connection(source.name, target.name, port))
    return frozenset(found)


def _lets(policies: list[dict[str, Any]], pod: Party, other: Party, port: int, direction: str) -> bool:
    about = [p for p in policies if direction in p["policyTypes"] and selects(p["podSelector"], pod.labels)]
    if not about:
        return True
    peers_of = "to" if direction == "Egress" else "from"
    rules = (rule for policy in about for rule in policy.get(direction.lower(), []))
    return any(_is_peer(rule.get(peers_of), other) and _is_port(rule.get("ports"), port) for rule in rules)


def _is_peer(peers: list[dict[str, Any]] | None, other: Party) -> bool:
    return peers is None or any(_matches(peer, other) for peer in peers)


def _matches(peer: dict[str, Any], other: Party) -> bool:
    if "ipBlock" in peer:
        # Pods have addresses too; whether a block means them is up to the network. Here it means the outside.
        block = peer["ipBlock"]
        inside = [ipaddress.ip_network(text) for text in block.get("except", [])]
        if other.address is None:
            return False
        address = ipaddress.ip_address(other.address)
        return address in ipaddress.ip_network(block["cidr"]) and not any(address in network for network in inside)
    if other.address is not None:
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], other.namespace):
            return False
    elif other.namespace.get(LABEL) != NAMESPACE:
        return False
    return selects(peer.get("podSelector"), other.labels)


def _is_port(ports: list[dict[str, Any]] | None, port: int) -> bool:
    return ports is None or any(row["port"] == port for row in ports)


def expected(name: str) -> frozenset[Connection]:
    own = {party.name for party in parties(name) if party.own}
    # The egress of the API's and the store's policies is by port and block: what else answers there may be asked too.
    outside = {
        Connection(c.source, target.name, c.port)
        for c in OF_OVERLAY[name]
        if c.target in ("api-server", "internet")
        for target in OUTSIDERS
        if target.address is not None and not (c.target == "internet" and target.name == "metadata")
    }
    dns = {Connection(source, "dns", DNS) for source in own}
    return frozenset(OF_OVERLAY[name] | CLIENTS | outside | dns)


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_policies_allow_what_the_code_opens_and_nothing_else(name: str) -> None:
    may, does = allowed(name), expected(name)
    assert sorted(map(str, does - may)) == [], "needed, and not allowed"
    assert sorted(map(str, may - does)) == [], "allowed, and not needed"


@pytest.mark.parametrize("name", OVERLAYS)
def test_weights_and_the_learner_are_out_of_reach_from_outside(name: str) -> None:
    control = {c for c in allowed(name) if c.port == CONTROL}
    assert control == {Connection("learner", "generation", CONTROL)}
    outsiders = {party.name for party in OUTSIDERS}
    assert not [c for c in allowed(name) if c.source in outsiders and c.target in ("learner", "conductor") and c.port == GRPC]


@pytest.mark.parametrize("name", OVERLAYS)
def test_strangers_are_kept_out_and_health_is_for_the_node_alone(name: str) -> None:
    may = allowed(name)
    assert not [c for c in may if c.source in ("stranger", "intruder", "system", "keda-other") and c.target != "dns"]
    assert not [c for c in may if c.port == 8081]
    pods = {party.name for party in parties(name) if party.own} - {"conductor", "secrets"}
    assert not [c for c in may if c.source in pods and c.port == API]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_ports_are_those_of_the_run_file(name: str) -> None:
    settings = run_settings(name)
    sections = [getattr(settings, part) for part in ("generation", "reward", "preference", "learner", "conductor")]
    assert {section.port for section in sections} == {GRPC}
    assert settings.generation.control_port == CONTROL


def test_a_record_of_local_ports_is_read_as_connections_of_a_cluster() -> None:
    rows = [
        {"listener": "generation", "serves": "honed.v1.GenerationService", "port": 40001},
        {"listener": "generation", "serves": "honed.v1.GenerationControlService", "port": 40002},
        {"from": "learner", "to": "127.0.0.1", "port": 40002},
        {"from": "reward-model", "to": "localhost", "port": 40001},
        {"from": "reward", "to": "127.0.0.1", "port": 40003},
        {"from": "reward", "to": "203.0.113.7", "port": 443},
    ]
    assert recorded(map(json.dumps, rows), {40003: ("redis", 6379)}) == {
        Connection("learner", "generation", CONTROL),
        Connection("job", "generation", GRPC),
        Connection("reward", "redis", 6379),
        Connection("reward", "203.0.113.7", HTTPS),
    }


def documented() -> Iterator[tuple[str, str, str]]:
    """The rows of the table in deploy/README.md."""
    text = (DEPLOY / "README.md").read_text()
    section = text.partition("## Network policies")[2].partition("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip(" `") for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4:
            yield cells[0], cells[1], cells[2]


def test_the_readme_has_every_policy_and_no_other() -> None:
    rendered = {p["metadata"]["name"] for name in OVERLAYS for p in of_kind(overlay(name), "NetworkPolicy")}
    assert {row[0] for row in documented()} == rendered
