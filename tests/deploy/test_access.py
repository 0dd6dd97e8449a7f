"""Each service account may do what its service calls, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType

import pytest
from tests.deploy.manifests import OVERLAYS, Tree, named, of_kind, overlay
from tests.support.cluster import ROLE

from honed import cluster
from honed.cluster import names
from honed.conductor.cluster import api
from honed.kit.scopes import LOCAL_TOKENS

Right = tuple[str, str, str, str]
"""API group, resource, name (empty for all), verb."""

MADE = (names.TABLE, names.REDIS, names.DATABASE, *map(names.of_token, LOCAL_TOKENS))
SECRETS = frozenset({("", "secrets", "", "create"), *(("", "secrets", name, "get") for name in MADE)})


def rights(role: Tree) -> frozenset[Right]:
    return frozenset(
        (group, resource, name, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [""])
        for verb in rule["verbs"]
    )


def documented(module: ModuleType) -> Iterator[Right]:
    """What a module says that it needs: `batch  jobs  list, watch, create`, names after `of`; a paragraph ends the table."""
    text = (module.__doc__ or "").partition("needs just this:\n\n")[2].partition("\n\n")[0]
    for line in filter(str.strip, text.splitlines()):
        group, resource, rest = line.split(None, 2)
        for part in rest.split(";"):
            verbs, _, names = part.partition(", of ") if ", of " in part else (part, "", "")
            for verb in re.split(r", | and ", verbs.strip()):
                for name in re.split(r", | and ", names.strip()) if names else [""]:
                    yield "" if group == "(core)" else group, resource, name, verb


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_conductor_may_do_what_its_module_says_and_nothing_else(name: str) -> None:
    assert rights(named(overlay(name), "Role", "honed-conductor")) == frozenset(documented(api))


@pytest.mark.parametrize("name", OVERLAYS)
def test_whoever_operates_a_run_may_do_what_the_command_line_calls_and_nothing_else(name: str) -> None:
    trees = overlay(name)
    [run_map] = {tree["metadata"]["name"] for tree in of_kind(trees, "ConfigMap")} & {
        name for _, kind, name, _ in rights(named(trees, "Role", "honed-operator")) if kind == "configmaps"
    }
    wanted = {(group, kind, run_map if of == names.RUN_MAP else of, verb) for group, kind, of, verb in documented(cluster)}
    assert rights(named(trees, "Role", "honed-operator")) == wanted


def test_the_stand_in_of_the_tests_grants_the_same() -> None:
    assert {(verb, resource, name) for _, resource, name, verb in documented(api)} == ROLE


@pytest.mark.parametrize("name", OVERLAYS)
def test_nobody_else_may_do_anything(name: str) -> None:
    trees = overlay(name)
    makes = [role for role in of_kind(trees, "Role") if role["metadata"]["name"] == "honed-secrets"]
    assert {role["metadata"]["name"] for role in of_kind(trees, "Role")} <= {
        "honed-conductor",
        "honed-secrets",
        "honed-operator",
    }
    assert all(rights(role) == SECRETS for role in makes)
    assert not of_kind(trees, "ClusterRole", "ClusterRoleBinding")
    for binding in of_kind(trees, "RoleBinding"):
        assert binding["roleRef"]["kind"] == "Role"
        assert binding["roleRef"]["name"] == binding["metadata"]["name"]
        assert binding["metadata"]["name"] != "honed-operator", "who operates a run is for the cluster to say"
        [subject] = binding["subjects"]
        assert (subject["kind"], subject["name"]) == ("ServiceAccount", binding["metadata"]["name"])
