"""Each service account may do what its service calls, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from tests.deploy.manifests import OVERLAYS, Tree, named, of_kind, overlay
from tests.support.cluster import ROLE

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


def documented() -> Iterator[Right]:
    """What the conductor's module says that it needs: `batch  jobs  list, watch, create`, names after `of`."""
    text = (api.__doc__ or "").partition("needs just this:")[2]
    for line in filter(str.strip, text.splitlines()):
        group, resource, rest = line.split(None, 2)
        for part in rest.split(";"):
            verbs, _, names = part.partition(", of ") if ", of " in part else (part, "", "")
            for verb in re.split(r", | and ", verbs.strip()):
                for name in re.split(r", | and ", names.strip()) if names else [""]:
                    yield "" if group == "(core)" else group, resource, name, verb


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_conductor_may_do_what_its_module_says_and_nothing_else(name: str) -> None:
    assert rights(named(overlay(name), "Role", "honed-conductor")) == frozenset(documented())


def test_the_stand_in_of_the_tests_grants_the_same() -> None:
    assert {(verb, resource, name) for _, resource, name, verb in documented()} == ROLE


@pytest.mark.parametrize("name", OVERLAYS)
def test_nobody_else_may_do_anything(name: str) -> None:
    trees = overlay(name)
    makes = [role for role in of_kind(trees, "Role") if role["metadata"]["name"] == "honed-secrets"]
    assert {role["metadata"]["name"] for role in of_kind(trees, "Role")} <= {"honed-conductor", "honed-secrets"}
    assert all(rights(role) == SECRETS for role in makes)
    assert not of_kind(trees, "ClusterRole", "ClusterRoleBinding")
    for binding in of_kind(trees, "RoleBinding"):
        assert binding["roleRef"]["kind"] == "Role"
        assert binding["roleRef"]["name"] == binding["metadata"]["name"]
        [subject] = binding["subjects"]
        assert (subject["kind"], subject["name"]) == ("ServiceAccount", binding["metadata"]["name"])
