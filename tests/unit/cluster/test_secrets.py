"""Claims about `honed cluster secrets`: it makes what is missing, overwrites nothing, and two at once agree."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.kubernetes import KubernetesApi
from typer.testing import CliRunner

from honed.cli.main import app
from honed.cluster.api import Cluster
from honed.cluster.secrets import ensure_secrets
from honed.kit.errors import FailedPrecondition, PermissionDenied, Unauthenticated
from honed.kit.scopes import LOCAL_TOKENS
from honed.kit.tokens import TokenTable, new_token

TOKENS = [f"honed-token-{name}" for name in LOCAL_TOKENS]
EVERY = sorted([*TOKENS, "honed-token-table", "honed-redis", "honed-database"])
SCORE = "/honed.v1.RewardService/Score"
COMMIT = "/honed.v1.GenerationControlService/CommitVersion"


def table_of(api: KubernetesApi, path: Path) -> TokenTable:
    """The table as a Pod mounts it."""
    path.write_text(api.texts("honed-token-table")["table.json"])
    return TokenTable.load(path)


def test_everything_is_made_once_and_the_table_knows_each_token(api: KubernetesApi, cluster: Cluster, tmp_path: Path) -> None:
    made = ensure_secrets(cluster)
    assert (sorted(made.made), made.found) == (EVERY, [])
    table = table_of(api, tmp_path / "table.json")
    for name in LOCAL_TOKENS:
        token = api.texts(f"honed-token-{name}")[f"{name}.token"].strip()
        if name in ("operator", "application", "conductor"):
            assert table.authorize(f"Bearer {token}", SCORE).name == name
    learner = api.texts("honed-token-learner")["learner.token"].strip()
    assert table.authorize(f"Bearer {learner}", COMMIT).name == "learner"
    with pytest.raises(Unauthenticated):
        table.authorize(f"Bearer {new_token()}", SCORE)
    assert len({api.texts(name)["password"] for name in ("honed-redis", "honed-database")}) == 2
    assert api.texts("honed-redis")["password"].isalnum(), "it becomes a part of URLs"
    assert api.objects["secrets"]["honed-redis"]["metadata"]["labels"]["app.kubernetes.io/part-of"] == "honed"

    before = json.dumps(api.objects["secrets"], sort_keys=True)
    again = ensure_secrets(cluster)
    assert (again.made, sorted(again.found)) == ([], EVERY)
    assert json.dumps(api.objects["secrets"], sort_keys=True) == before


def test_what_is_there_already_is_used(api: KubernetesApi, cluster: Cluster, tmp_path: Path) -> None:
    api.secret("honed-token-operator", operator_token="brought by hand\n")
    api.secret("honed-redis", password="hunter2")
    made = ensure_secrets(cluster)
    assert sorted(made.found) == ["honed-redis", "honed-token-operator"]
    assert api.texts("honed-redis") == {"password": "hunter2"}
    assert table_of(api, tmp_path / "table.json").authorize("Bearer brought by hand", COMMIT).name == "operator"


def test_two_at_once_make_one_set(api: KubernetesApi, cluster: Cluster, tmp_path: Path) -> None:
    """Each starts a Secret when both have seen that it is missing."""
    both = threading.Barrier(2, timeout=30)

    def one(_: int) -> list[str]:
        own = Cluster(cluster.configuration, cluster.namespace, cluster.context)

        def new() -> str:
            both.wait()
            return new_token()

        return ensure_secrets(own, new).made

    with ThreadPoolExecutor(2) as pool:
        made = [name for names in pool.map(one, range(2)) for name in names]
    assert sorted(made) == EVERY, "each was made by one of the two"
    table = table_of(api, tmp_path / "table.json")
    operator = api.texts("honed-token-operator")["operator.token"].strip()
    assert table.authorize(f"Bearer {operator}", COMMIT).name == "operator"


def test_one_that_was_killed_half_way_is_gone_on_with(api: KubernetesApi, cluster: Cluster, tmp_path: Path) -> None:
    tokens = iter([new_token(), new_token()])
    with pytest.raises(StopIteration):
        ensure_secrets(cluster, lambda: next(tokens))
    first = api.texts("honed-token-operator")
    assert len(api.objects["secrets"]) == 2
    ensure_secrets(cluster)
    assert api.texts("honed-token-operator") == first
    assert (
        table_of(api, tmp_path / "table.json").authorize(f"Bearer {first['operator.token'].strip()}", COMMIT).name == "operator"
    )


def test_one_that_appears_between_the_look_and_the_making_is_used(api: KubernetesApi, cluster: Cluster) -> None:
    """As when the server made it, and its answer was lost: the repetition is refused."""

    def new() -> str:
        api.secret("honed-token-operator", operator_token="of the first try")
        return new_token()

    made = ensure_secrets(cluster, new)
    assert made.found == ["honed-token-operator"]
    assert api.texts("honed-token-operator") == {"operator.token": "of the first try"}


def test_a_token_that_the_table_knows_and_that_is_gone_is_not_made_anew(api: KubernetesApi, cluster: Cluster) -> None:
    ensure_secrets(cluster)
    api.remove("secrets", "honed-token-learner")
    with pytest.raises(FailedPrecondition, match="lacks honed-token-learner and has honed-token-table"):
        ensure_secrets(cluster)
    api.remove("secrets", "honed-token-table")
    assert sorted(ensure_secrets(cluster).made) == ["honed-token-learner", "honed-token-table"]


def test_a_secret_of_another_form_is_named(api: KubernetesApi, cluster: Cluster) -> None:
    api.secret("honed-redis", pass_word="x")
    with pytest.raises(FailedPrecondition, match="honed-redis in namespace kind-test/honed has no key password"):
        ensure_secrets(cluster)


def test_a_missing_right_is_named(api: KubernetesApi, cluster: Cluster) -> None:
    api.forbidden.add(("create", "secrets"))
    with pytest.raises(PermissionDenied, match='cannot create resource "secrets"'):
        ensure_secrets(cluster)


def test_the_command_says_what_it_made_and_no_token(api: KubernetesApi, tmp_path: Path) -> None:
    environment = {"KUBECONFIG": str(tmp_path / "kubeconfig")}
    done = CliRunner().invoke(app, ["--cluster", "cluster", "secrets"], env=environment)
    assert done.exit_code == 0, done.output
    assert sorted(done.stdout.split()) == sorted(word for name in EVERY for word in ("made", name))
    assert "10 Secrets made, 0 were there" in done.stderr
    for name in TOKENS:
        [token] = api.texts(name).values()
        assert token.strip() not in done.output
    again = CliRunner().invoke(app, ["--cluster", "kind-test/honed", "cluster", "secrets", "--json"], env=environment)
    assert json.loads(again.stdout) == {
        "namespace": "kind-test/honed",
        "made": [],
        "found": [*TOKENS, "honed-redis", "honed-database", "honed-token-table"],
    }
