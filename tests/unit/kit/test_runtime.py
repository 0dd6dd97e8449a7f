"""From the settings to the kit: whose token a call carries, how long a port lingers, what depends on what."""

from __future__ import annotations

import ast
import json
from contextvars import copy_context
from pathlib import Path

import pytest

import honed.kit
from honed.config import RunSettings
from honed.kit.tokens import digest, ensure_local_tokens
from honed.runtime import internal_token, server_options, service_name
from honed.settings import SecuritySettings


def name_of(token: str, directory: Path) -> str:
    rows = json.loads((directory / "table.json").read_text())["tokens"]
    return next(row["name"] for row in rows if row["sha256"] == digest(token))


def carried(settings: RunSettings, service: str | None = None) -> str:
    token = internal_token(settings, service)
    assert token is not None
    return token()


def test_calls_carry_the_token_of_the_service_that_makes_them(tmp_path: Path) -> None:
    settings = RunSettings(directory=tmp_path)
    ensure_local_tokens(settings.tokens_directory)

    def as_learner() -> str:
        service_name.set("learner")  # what `honed serve learner` does
        return carried(settings)

    assert name_of(copy_context().run(as_learner), settings.tokens_directory) == "learner"
    assert name_of(carried(settings), settings.tokens_directory) == "conductor"
    assert name_of(carried(settings, "operator"), settings.tokens_directory) == "operator"


def test_a_directory_with_the_one_token_of_an_earlier_build_goes_on_working(tmp_path: Path) -> None:
    (tmp_path / "internal.token").write_text("honed_old\n")
    settings = RunSettings(directory=tmp_path, security=SecuritySettings(tokens=tmp_path))
    assert carried(settings, "learner") == "honed_old"


def test_without_authentication_there_is_no_token(tmp_path: Path) -> None:
    settings = RunSettings(directory=tmp_path, security=SecuritySettings(authentication=False))
    assert internal_token(settings) is None


@pytest.mark.parametrize(
    ("host", "linger_s", "expected"), [("127.0.0.1", None, 0), ("0.0.0.0", None, 3), ("127.0.0.1", 2, 2), ("::", 0, 0)]
)
def test_a_port_lingers_where_there_may_be_load_balancers(
    tmp_path: Path, host: str, linger_s: float | None, expected: float
) -> None:
    settings = RunSettings(directory=tmp_path)
    section = settings.preference.model_copy(update={"host": host, "linger_s": linger_s})
    assert server_options(settings, section).linger_s == expected


def test_the_kit_knows_nothing_of_settings_and_services() -> None:
    folder = Path(honed.kit.__file__).parent
    for path in sorted(folder.glob("*.py")):
        if path.name == "wiring.py":  # re-exports until its last caller has gone
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = [name for name in names if name.startswith("honed.") and not name.startswith("honed.kit")]
            assert not ours, f"{path.name} imports {ours}"
