"""A service's token opens what the service calls, and nothing else: read off its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import honed
from honed.kit.scopes import LOCAL_TOKENS, SCOPES

ROOT = Path(honed.__file__).parent
RUNS_WITH_ITS_TOKEN = {
    "generation": ["generation"],
    "reward": ["reward"],
    "preference": ["preference"],
    "learner": ["learner"],  # its jobs among it
    "conductor": ["conductor", "cli/display.py"],
}
"""What runs in a process that carries the token of a service and opens channels with it."""
TOKENS_OF_OTHERS = {ROOT / "reward" / "remote_scorer.py"}
"""What calls with a token that its settings name: another run's service knows no token of this one."""


def names(files: Iterator[Path]) -> set[str]:
    """Every `something.Name` in some files; a handler's definition is none."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def calls(parts: list[str]) -> set[str]:
    """The methods `/honed.v1.Service/Method` that a service calls: of each service that it has a stub of, those it names."""
    found = names(
        file
        for part in parts
        for file in ([ROOT / part] if part.endswith(".py") else (ROOT / part).rglob("*.py"))
        if file not in TOKENS_OF_OTHERS
    )
    stubs = {match[1] for name in found if (match := re.fullmatch(r"(\w+Service)(?:Async)?Stub", name))}
    rows = [(method, *method.removeprefix("/honed.v1.").split("/")) for method in SCOPES if method.startswith("/honed.v1.")]
    return {method for method, service, name in rows if service in stubs and name in found}


@pytest.mark.parametrize("service", sorted(LOCAL_TOKENS.keys() - {"operator", "application"}))
def test_a_token_has_the_scopes_of_what_its_service_calls(service: str) -> None:
    assert set(LOCAL_TOKENS[service]) == {SCOPES[method] for method in calls(RUNS_WITH_ITS_TOKEN[service])}


def test_the_calls_are_found() -> None:
    """Otherwise the claim above would hold for services that call nobody."""
    assert calls(RUNS_WITH_ITS_TOKEN["learner"]) >= {
        "/honed.v1.GenerationControlService/PrepareVersion",
        "/honed.v1.PreferenceService/ExportJudgements",
    }
    assert calls(RUNS_WITH_ITS_TOKEN["conductor"]) >= {"/honed.v1.LearnerService/Rollback", "/honed.v1.ConductorService/GetRun"}
