"""From the settings to parameters, and from a report to figures: flat, by dotted key, and without a secret."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from honed.config import RunSettings
from honed.settings_file import has_password, without_password, without_secrets
from honed.workspace import Workspace

_NO_FIGURES: Final = ("samples", "alarms")


def parameters_of(settings: RunSettings) -> dict[str, str]:
    """Every setting by its dotted key, as text. Secrets are left out, and passwords are cut out of URLs."""
    return flat(without_secrets(settings))


def flat(tree: Mapping[str, Any]) -> dict[str, str]:
    """The leaves of a tree of settings by dotted key, as text, but ports and addresses, which a start may choose anew."""
    return {key: value for key, value in _leaves(tree) if not key.endswith(("port", "address"))}


def figures_of(workspace: Workspace) -> dict[str, float]:
    """The numbers of a run's reports: `report/…` of report.json, `recipe/…` of recipe.json."""
    found: dict[str, float] = {}
    for path in (workspace.report_json, workspace.recipe_json):
        for key, value in _numbers(_read(path)):
            found[f"{path.stem}/{key}"] = value
    return found


def files_of(workspace: Workspace) -> list[Path]:
    """The files to keep with a run that are there: reports, and the settings without secrets."""
    wanted = (workspace.report_html, workspace.report_json, workspace.recipe_json, workspace.effective_settings)
    return [path for path in wanted if path.is_file()]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            text = _public(value)
            yield f"{prefix}{name}", text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)


def _public(value: Any) -> Any:
    """A value without passwords, wherever a list of it has a URL."""
    if isinstance(value, str):
        return without_password(value) if has_password(value) else value
    if isinstance(value, Mapping):
        return {name: _public(part) for name, part in value.items()}
    return [_public(part) for part in value] if isinstance(value, (list, tuple)) else value


def _numbers(tree: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    if not isinstance(tree, Mapping):
        return
    for name, value in tree.items():
        if isinstance(value, bool) or name in _NO_FIGURES:
            continue
        if isinstance(value, (int, float)):
            yield f"{prefix}{name}", float(value)
        else:
            yield from _numbers(value, f"{prefix}{name}/")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or written by a person
        return None
