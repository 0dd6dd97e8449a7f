"""`honed config show`: the effective settings, and where each value comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from honed.cli import output

_MASK = "**********"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(no_args_is_help=True, help="The run file and what overrides it.")
    group.command(epilog="Example: HONED_LEARNER__BATCH=512 honed config show --run-file run.yaml --set")(show)
    app.add_typer(group, name="config")


def show(
    run_file: Annotated[
        Path | None, typer.Option("--run-file", "-f", envvar="HONED_RUN_FILE", help="The run file. Unset: defaults alone.")
    ] = None,
    only_set: Annotated[bool, typer.Option("--set", help="Leave out what has its default.")] = False,
    json: output.JsonOption = False,
) -> None:
    """Show every setting with its value and its source: default, file or environment. Secrets are masked."""
    from honed.settings_file import explain_settings

    leaves = [(key, plain(value), source) for key, value, source in explain_settings(run_file)]
    chosen = [leaf for leaf in leaves if not only_set or leaf[2] != "default"]
    if json:
        output.show_json({key: {"value": value, "source": source} for key, value, source in chosen})
        return
    output.show(output.table(["key", "value", "source"], [(key, _written(value), source) for key, value, source in chosen]))


def plain(value: Any) -> Any:
    """A setting as JSON has it, with secrets masked: declared ones, and passwords inside URLs."""
    from pydantic import BaseModel, SecretStr

    if isinstance(value, SecretStr):
        return _MASK
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str) and "://" in value and (password := urlsplit(value).password):
        return value.replace(f":{password}@", f":{_MASK}@", 1)
    return value


def _written(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(_written, value)) if isinstance(value, list) else str(value)
