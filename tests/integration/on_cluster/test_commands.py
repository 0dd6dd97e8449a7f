"""Claims about `honed --cluster`: each command against real services behind forwarded ports; tokens, certificates, errors."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, start_http_server
from tests.integration.client import served, top_served
from tests.integration.client.test_dead import bury
from tests.integration.on_cluster.conftest import GRPC, METRICS, REDIS, Place
from tests.support.authority import Authority
from tests.support.kubernetes import pod

from honed.cli.connection import ask_cluster, find_cluster
from honed.cli.replicas import PodReplicas, figures
from honed.cli.top import Watch
from honed.client import RequestError
from honed.kit.server import Listener, Server, ServerOptions
from honed.kit.tokens import TokenTable
from honed.queue.embedded import EmbeddedRedis
from honed.v1 import common_pb2


@pytest.fixture
def run(place: Place) -> Iterator[Place]:
    """A whole run: one Pod a service, and two of generation."""
    place.generator("honed-generation-a")
    place.generator("honed-generation-b")
    directory = place.kubeconfig.parent
    for component, servicer in (
        ("reward", served.RewardByLength().servicer()),
        ("preference", served.preference(place.loop, directory)),
        ("learner", served.Learner().servicer()),
        ("conductor", served.Conductor().servicer()),
    ):
        place.serve(f"honed-{component}-0", component, servicer)
    return place


def test_generate_and_score_need_no_address(run: Place) -> None:
    done = run.honed("generate", "the film was", "--max-tokens", "2")
    assert (done.exit_code, done.stdout) == (0, "a fine \n"), done.output
    assert "version 1.4, 2 tokens" in done.stderr
    assert "+26.0000" in run.honed("score", "--prompt", "the film was", "fine", "dull and long").stdout


def test_streams_come_through(run: Place) -> None:
    assert run.honed("generate", "the film was", "--stream").stdout == "a fine film\n"


def test_versions_prompts_and_judgements(run: Place, tmp_path: Path) -> None:
    assert "1.250" in run.honed("versions").stdout.splitlines()[1]
    assert json.loads(run.honed("prompts", "status", "--json").stdout)["admitted"] == 1500
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "chosen": "good", "rejected": "bad"}) + "\n")
    imported = run.honed("judge", "import", str(pairs), "--format", "trl")
    assert imported.stdout == "1 stored, 0 there already\n", imported.output
    assert json.loads(run.honed("judge", "stats", "--json").stdout)["judgements"] == 1


def test_status_shows_the_run_and_its_pods(run: Place) -> None:
    waiting = {"name": "generation", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
    run.api.put("pods", "honed-generation-c", pod("generation", ready=False, containerStatuses=[waiting]))
    shown = run.honed("status").stdout
    for part in (
        "demo in kind-test/honed",
        "ppo, 12%",
        "1280 trained",
        "version 1.5 by recorded 1",
        "ImagePullBackOff: not found",
    ):
        assert part in shown
    tree = json.loads(run.honed("status", "--json").stdout)
    assert tree["cluster"] == "kind-test/honed"
    assert [each["name"] for each in tree["pods"] if not each["ready"]] == ["honed-generation-c"]


def test_status_shows_the_rest_when_a_service_has_no_pod(run: Place) -> None:
    run.api.put("statefulsets", "honed-learner", {"spec": {"replicas": 0}})
    run.api.remove("pods", "honed-learner-0")
    done = run.honed("status")
    assert done.exit_code == 0, done.output
    assert "honed-learner is scaled to 0" in done.stdout
    assert "version 1.5 by recorded 1" in done.stdout


def test_status_of_a_namespace_without_a_run_fails(place: Place) -> None:
    done = place.honed("status")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "there is no conductor Pod in namespace kind-test/honed" in done.stderr


@pytest.mark.redis
def test_dead_letters_are_reached_through_redis_own_port(place: Place, tmp_path: Path) -> None:
    url = place.loop.enter(EmbeddedRedis(tmp_path / "redis"))
    rollout = common_pb2.Rollout(rollout_id="g/0", group_id="g", run="demo", prompt_token_ids=[5, 6])
    place.loop.run(bury(url, "rollouts", rollout.SerializeToString(), "g/0"))
    password, _, address = url.removeprefix("redis://").partition("@")
    host, _, port = address.partition("/")[0].partition(":")
    place.api.put("pods", "honed-redis-0", pod("redis"))
    place.api.backends["honed-redis-0", REDIS] = (host, int(port))
    place.api.secret("honed-redis", password=password.lstrip(":"))
    listed = place.honed("dead", "list")
    assert "the scorer raised" in listed.stdout, listed.output
    letter = json.loads(place.honed("dead", "list", "--json").stdout)["letter"]
    assert "is entry" in place.honed("dead", "replay", letter).stdout
    assert "0 in rollouts" in place.honed("dead", "list").stderr
    place.api.remove("pods", "honed-redis-0")
    place.api.put("pods", "honed-conductor-0", pod("conductor"))
    assert "the run's Redis, honed-redis, is no Pod of namespace" in place.honed("dead", "list").stderr


def test_without_the_secret_a_token_is_taken_from_the_environment_or_a_file(place: Place) -> None:
    generation = place.generator("honed-generation-a")
    application = (place.tokens / "application.token").read_text().strip()
    place.api.forbidden |= {("get", "secrets", f"honed-token-{name}") for name in ("operator", "application")}
    refused = place.honed("generate", "x")
    assert refused.exit_code == 1
    assert 'no token for the generation service: secrets "honed-token-operator" is forbidden' in refused.stderr
    assert "or give a token by --token-file or $HONED_TOKEN" in refused.stderr
    assert place.honed("generate", "x", HONED_TOKEN=application).exit_code == 0
    assert place.honed("generate", "x", "--token-file", str(place.tokens / "application.token")).exit_code == 0
    assert {seen["authorization"] for seen in generation.metadata} == {f"Bearer {application}"}


def test_who_may_read_the_applications_token_alone_can_generate(run: Place) -> None:
    run.api.forbidden.add(("get", "secrets", "honed-token-operator"))
    assert run.honed("generate", "x").exit_code == 0
    assert "honed-token-operator" in run.honed("versions").stderr


def test_a_token_that_the_service_does_not_know_is_named_by_its_source(place: Place) -> None:
    place.generator("honed-generation-a")
    place.api.secret("honed-token-operator", operator_token="old")
    done = place.honed("generate", "x")
    assert done.exit_code == 1
    assert "UNAUTHENTICATED" in done.stderr
    assert "the token was that of Secret honed-token-operator" in done.stderr


def test_a_missing_token_secret_is_told_unless_authentication_is_off(place: Place) -> None:
    server = Server([Listener("127.0.0.1", 0, [served.Generation().servicer()])], ServerOptions())
    place.loop.run(server.start())
    place.api.put("pods", "honed-generation-a", pod("generation"))
    place.api.backends["honed-generation-a", GRPC] = ("127.0.0.1", server.ports[0])
    for name in ("operator", "application"):
        place.api.remove("secrets", f"honed-token-{name}")
    assert "there is no Secret honed-token-operator in namespace kind-test/honed" in place.honed("generate", "x").stderr
    place.api.put("configmaps", "honed-run-5f7c", {"data": {"run.yaml": "security: {authentication: false}"}})
    assert place.honed("generate", "x").exit_code == 0
    place.loop.run(server.stop())


def test_certificates_come_from_a_secret_where_mutual_tls_is_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography import x509

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (tmp_path / "certificates").mkdir()
    authority = Authority(tmp_path / "certificates", "ours", x509.DNSName("honed"))
    options = ServerOptions(tokens=TokenTable.load(place.tokens / "table.json"), tls=authority.issue("server"))
    server = Server([Listener("127.0.0.1", 0, [served.Generation().servicer()])], options)
    place.loop.run(server.start())
    place.api.put("pods", "honed-generation-a", pod("generation"))
    place.api.backends["honed-generation-a", GRPC] = ("127.0.0.1", server.ports[0])
    tls = "{authority: /etc/honed/tls/ca.crt, certificate: /etc/honed/tls/tls.crt, key: /etc/honed/tls/tls.key}"
    place.api.put("configmaps", "honed-run-5f7c", {"data": {"run.yaml": f"security: {{tls: {tls}}}"}})
    assert "has no Secret honed-tls-operator with ca.crt, tls.crt, tls.key" in place.honed("generate", "x").stderr
    # Who must not read the run file learns from the Pods, where the manifests set it.
    place.api.forbidden.add(("get", "configmaps"))
    with_tls = pod("generation")
    variables = [{"name": f"HONED_SECURITY__TLS__{name}", "value": f"/etc/honed/tls/{name}"} for name in ("AUTHORITY", "KEY")]
    with_tls["spec"]["containers"][0]["env"] = [*variables, {"name": "HONED_SECURITY__TLS__SERVER_NAME", "value": "honed"}]
    place.api.put("pods", "honed-generation-a", with_tls)
    mine = authority.issue("operator")
    files = {"ca_crt": mine.authority, "tls_crt": mine.certificate, "tls_key": mine.key}
    place.api.secret("honed-tls-operator", **{key: path.read_text() for key, path in files.items()})
    done = place.honed("generate", "x")
    assert (done.exit_code, done.stdout) == (0, "a fine film\n"), done.output
    assert not list(temporary.rglob("*")), "the key is in no file, which a signal would leave behind"
    place.loop.run(server.stop())


def test_rights_that_are_missing_are_named(run: Place) -> None:
    run.api.forbidden.add(("list", "pods"))
    assert 'cannot list resource "pods"' in run.honed("generate", "x").stderr
    run.api.forbidden = {("create", "pods/portforward")}
    done = run.honed("generate", "x")
    assert done.exit_code == 1
    assert 'cannot create resource "pods/portforward"' in done.stderr


def test_a_run_file_that_may_not_be_read_is_not_needed_to_generate(run: Place) -> None:
    run.api.forbidden.add(("get", "configmaps"))
    assert run.honed("generate", "x").exit_code == 0
    assert 'cannot get resource "configmaps"' in run.honed("dead", "list").stderr


def test_the_role_for_people_is_enough_for_each_command(run: Place) -> None:
    accounts = yaml.safe_load_all((Path(__file__).parents[3] / "deploy" / "base" / "accounts.yaml").read_text())
    [role] = [tree for tree in accounts if (tree["kind"], tree["metadata"]["name"]) == ("Role", "honed-operator")]
    text = yaml.safe_dump(role["rules"]).replace("honed-run", "honed-run-5f7c")  # as kustomize does
    run.api.allowed = yaml.safe_load(text)
    run.api.put("deployments", "honed-generation", {"spec": {"replicas": 2}})
    run.api.put("deployments", "honed-reward", {"spec": {"replicas": 0}})
    run.api.put("pods", "honed-generation-c", pod("generation", ready=False, phase="Pending"))
    for words in (
        ("generate", "x"),
        ("score", "--prompt", "p", "fine"),
        ("status",),
        ("top", "--once"),
        ("versions",),
        ("prompts", "status"),
        ("judge", "stats"),
        ("scale", "generation=3", "--timeout", "1"),
        ("dead", "list"),
    ):
        shown = run.honed(*words).output
        assert "forbidden" not in shown, words
    run.api.remove("pods", "honed-reward-0")
    assert "honed-reward is scaled to 0" in run.honed("score", "--prompt", "p", "fine").stderr
    run.api.put("pods", "honed-redis-0", pod("redis"))
    run.api.secret("honed-redis", password="p")
    run.honed("dead", "list")
    assert run.api.refusals == []
    assert "is forbidden" in run.honed("cluster", "secrets").stderr, "it makes Secrets, and reads every token"


def test_scale_sets_the_deployment_and_waits_for_its_pods(run: Place) -> None:
    run.api.put("deployments", "honed-generation", {"spec": {"replicas": 2}})
    coming = threading.Timer(0.5, lambda: run.api.put("pods", "honed-generation-c", pod("generation")))
    coming.start()
    done = run.honed("scale", "generation=3", "--json")
    coming.join()
    assert [row["name"][-1] for row in json.loads(done.stdout)] == ["a", "b", "c"], done.output
    assert run.api.objects["deployments"]["honed-generation"]["spec"]["replicas"] == 3
    late = run.honed("scale", "generation=4", "--timeout", "1")
    assert (late.exit_code, "3 of 3 generation Pods are ready, and 4 are wanted" in late.stderr) == (1, True)
    assert "has no Deployment honed-reward" in run.honed("scale", "reward=1").stderr


def test_scale_waits_no_longer_than_it_may_for_an_api_server_that_hangs(run: Place) -> None:
    run.api.put("deployments", "honed-generation", {"spec": {"replicas": 2}})
    hangs = threading.Timer(2, lambda: setattr(run.api, "hanging", True))
    hangs.start()
    begun = time.monotonic()
    done = run.honed("scale", "generation=3", "--timeout", "5")
    took_s = time.monotonic() - begun
    hangs.join()
    run.api.hanging = False
    assert run.api.objects["deployments"]["honed-generation"]["spec"]["replicas"] == 3
    assert "does not answer" in done.stderr, done.output
    assert took_s < 30, "one request alone would wait for three times 30 s"


def test_scale_leaves_to_an_autoscaler_what_it_decides(run: Place) -> None:
    target = {"kind": "Deployment", "name": "honed-generation"}
    run.api.put("deployments", "honed-generation", {"spec": {"replicas": 2}})
    run.api.put(
        "horizontalpodautoscalers", "keda-hpa", {"spec": {"scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 4}}
    )
    done = run.honed("scale", "generation=3")
    assert "the autoscaler keda-hpa sets the replicas of honed-generation, from 1 to 4" in done.stderr
    assert run.api.objects["deployments"]["honed-generation"]["spec"]["replicas"] == 2


def test_the_cluster_may_be_named_by_the_environment_and_other_options_come_first(run: Place, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from honed.cli.main import app

    environment = {"KUBECONFIG": str(run.kubeconfig), "HONED_CLUSTER": "kind-test/honed"}
    assert CliRunner().invoke(app, ["generate", "x"], env=environment).stdout == "a fine film\n"
    elsewhere = CliRunner().invoke(app, ["generate", "x", "--address", "127.0.0.1:1", "--timeout", "5"], env=environment)
    assert "generation service at 127.0.0.1:1 did not answer" in elsewhere.stderr
    both = run.honed("generate", "x", "--address", "127.0.0.1:1")
    assert "give one of them" in both.stderr


def test_top_shows_each_replica_and_the_learner(run: Place) -> None:
    registry = CollectorRegistry()  # its own: other tests of this process have left numbers in the global one
    Gauge("honed_reward_queued_items", "Items that wait.", registry=registry).set(4)
    metrics, serving = start_http_server(0, "127.0.0.1", registry)
    try:
        run.api.backends["honed-reward-0", METRICS] = ("127.0.0.1", metrics.server_port)
        run.serve("honed-reward-0", "reward", top_served.Reward().servicer())
        run.serve("honed-learner-0", "learner", top_served.Learner().servicer())
        run.serve("honed-generation-a", "generation", top_served.Generation().servicer())
        tree = json.loads(run.honed("top", "--once", "--json").stdout)
    finally:
        metrics.shutdown()
        metrics.server_close()
        serving.join(10)
    assert tree["cluster"] == "kind-test/honed"
    one, other, reward = tree["replicas"]
    assert [one["name"], other["name"]] == ["honed-generation-a", "honed-generation-b"]
    assert (one["version"], one["in_flight"], one["waiting"], one["pause_p95_ms"]) == ("1.5", 9, 2, 23.0)
    assert one["tokens_per_second"] > 0
    assert (other["tokens_per_second"], other["pause_p95_ms"]) == (0, 0), "an older build does not say"
    assert (reward["version"], reward["waiting"]) == ("people 0123abcd", 4)
    assert tree["learner"]["staleness_max"] == 2
    assert tree["learner"]["updates_per_minute"] == pytest.approx(6, abs=0.1)


def test_top_shows_why_a_replica_does_not_serve(run: Place) -> None:
    waiting = {"name": "generation", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
    run.api.put("pods", "honed-generation-b", pod("generation", ready=False, containerStatuses=[waiting]))
    shown = run.honed("top", "--once").stdout
    assert "generation: ImagePullBackOff: not found" in shown
    assert "honed-generation-a" in shown


def test_a_live_view_takes_the_token_that_replaces_a_wrong_one(run: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(run.kubeconfig))
    monkeypatch.delenv("HONED_TOKEN", raising=False)
    token = (run.tokens / "operator.token").read_text()
    run.serve("honed-reward-0", "reward", top_served.Reward().servicer())
    run.serve("honed-learner-0", "learner", top_served.Learner().servicer())
    ask_cluster("")
    try:
        with contextlib.ExitStack() as stack:
            watch = Watch(stack, find_cluster(), None, None)
            run.api.secret("honed-token-operator", operator_token="old")
            with pytest.raises(RequestError, match="UNAUTHENTICATED"):
                watch.look()
            replicas = PodReplicas(stack, one_run := run.run(), None)
            assert all("UNAUTHENTICATED" in row["error"] for row in figures(replicas, replicas.list(())))
            run.api.secret("honed-token-operator", operator_token=token)
            found = watch.look()
            assert "error" not in found["run"] | found["learner"]
            one_run.look_again()
            assert not any("UNAUTHENTICATED" in row.get("error", "") for row in figures(replicas, replicas.list(())))
    finally:
        ask_cluster(None)


def arguments(*words: str) -> list[str]:
    return list(words)


@pytest.mark.parametrize("words", [arguments("up"), arguments("config", "show"), arguments("serve", "learner")])
def test_commands_of_one_machine_refuse_a_cluster(place: Place, words: list[str]) -> None:
    done: Any = place.honed(*words)
    assert done.exit_code == 2
    assert "talks to no cluster" in done.stderr


def test_the_option_stands_before_the_command(place: Place) -> None:
    from typer.testing import CliRunner

    from honed.cli.main import app

    done = CliRunner().invoke(app, ["status", "--cluster", "x"])
    assert done.exit_code == 2
    assert "--cluster stands before the command" in done.stderr
