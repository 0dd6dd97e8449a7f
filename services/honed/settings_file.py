"""Reads the run file and the environment into `RunSettings`, and can say where each value came from."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from honed.config import RunSettings

Source = Literal["default", "file", "environment"]
PREFIX = "HONED_"
_NOT_SETTINGS = frozenset(
    {
        "HONED_TOKEN", "HONED_ADDRESS", "HONED_RUN_FILE", "HONED_RUN_DIR", "HONED_DEBUG", "HONED_CLUSTER",
        "HONED_RECORD_CONNECTIONS",
    }
)  # fmt: skip


class SettingsError(ValueError):
    """The run file or the environment is wrong; the message names the key and what to do."""


class _Environment(RunSettings, BaseSettings):
    """The same tree, read from the environment."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True)


def load_settings(
    path: Path | None, environment: Mapping[str, str] = os.environ, *, over: Mapping[str, Any] | None = None
) -> RunSettings:
    """Reads the settings: defaults, then the run file, then the environment, then `over`, a tree as the run file's.

    Raises:
        SettingsError: the file cannot be read, a key is unknown (names the nearest), or a value is wrong.
    """
    return _load(path, environment, over)[0]


def recipe_settings(
    path: Path | None, recipe: str, environment: Mapping[str, str] = os.environ, *, over: Mapping[str, Any] | None = None
) -> RunSettings:
    """Reads a run file; without one, the recipe of that name which the package carries.

    Raises:
        SettingsError: as `load_settings`.
    """
    with resources.as_file(resources.files("honed.recipes").joinpath(f"{recipe}.yaml")) as carried:
        return load_settings(path or carried, environment, over=over)


def explain_settings(path: Path | None, environment: Mapping[str, str] = os.environ) -> Iterator[tuple[str, Any, Source]]:
    """Yields (dotted key, value, source) for each leaf of the effective tree, in the order of the tree."""
    settings, file_tree, environment_tree = _load(path, environment)
    for key, value in _leaves(settings):
        source: Source = "default"
        if _reaches(environment_tree, key):
            source = "environment"
        elif _reaches(file_tree, key):
            source = "file"
        yield key, value, source


def write_settings(settings: RunSettings, path: Path) -> None:
    """Writes a run file with every value but the secrets, which `secret_environment` has; only its owner can read it."""
    tree = without_secrets(settings)
    partial = path.with_suffix(".partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        os.fchmod(file.fileno(), 0o600)  # also where an earlier run left the file
        file.write(yaml.safe_dump(tree, sort_keys=False))
    partial.rename(path)


def without_secrets(settings: RunSettings) -> dict[str, Any]:
    """The tree as JSON has it, without declared secrets and without the passwords of URLs."""
    tree = settings.model_dump(mode="json")
    for key in _secrets(settings):
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section[part]
        url = section[name]
        if isinstance(url, str) and has_password(url):
            section[name] = without_password(url)
        else:
            del section[name]
    return tree


def secret_environment(settings: RunSettings) -> dict[str, str]:
    """What `write_settings` leaves out, as environment variables for a process that reads the file."""
    return {PREFIX + key.upper().replace(".", "__"): value for key, value in _secrets(settings).items()}


def _secrets(settings: RunSettings) -> dict[str, str]:
    """Secret values by dotted key: those declared as secrets, and URLs with a password."""
    found = {}
    for key, value in _leaves(settings):
        if isinstance(value, SecretStr):
            found[key] = value.get_secret_value()
        elif isinstance(value, str) and has_password(value):
            found[key] = value
    return found


def has_password(text: str) -> bool:
    """Whether a text is a URL with a password in it."""
    if "://" not in text or "@" not in text:
        return False
    try:
        return urlsplit(text).password is not None
    except ValueError:
        return True  # no URL that can be taken apart: whatever stands before the @ stays hidden


def without_password(url: str) -> str:
    """A URL without its password; the user's name stays."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    user = f"{parts.username}@" if parts.username else ""
    return urlunsplit(parts._replace(netloc=user + host))


def _load(
    path: Path | None, environment: Mapping[str, str], over: Mapping[str, Any] | None = None
) -> tuple[RunSettings, dict[str, Any], dict[str, Any]]:
    file_tree = _read_file(path) if path is not None else {}
    environment_tree = _read_environment(environment)
    try:
        tree = _merged(_merged(file_tree, environment_tree), dict(over or {}))
        return RunSettings.model_validate(tree), file_tree, environment_tree
    except ValidationError as error:
        raise SettingsError(_explained(error, path)) from error


def _read_file(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SettingsError(f"run file {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"run file {path} is not YAML: {_yaml_problem(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SettingsError(f"run file {path} must hold sections and keys, not a {type(tree).__name__}")
    return tree


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the line itself, which may hold a secret."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return type(error).__name__


def _read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    known = {PREFIX + key.upper().replace(".", "__") for key in _known_keys(RunSettings)}
    given = {k: v for k, v in environment.items() if k.startswith(PREFIX) and k not in _NOT_SETTINGS}
    for name in given:
        if name not in known:
            raise SettingsError(f"environment variable {name} names no setting{_nearest(name, known)}")
    source = EnvSettingsSource(_Environment)
    source.env_vars = {k.lower(): v for k, v in given.items()}
    return source()


def _explained(error: ValidationError, path: Path | None) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{_nearest(key, set(_known_keys(RunSettings)))}")
        else:
            lines.append(f"{key}: {problem['msg']}{_shown(key, problem['input'])}" if key else problem["msg"])
    return f"{path or 'settings'}: " + "; ".join(lines)


def _shown(key: str, value: Any) -> str:
    """A wrong value, unless it is or may hold a secret."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    if key in _secret_keys(RunSettings) or not plain or (isinstance(value, str) and has_password(value)):
        return ""
    return f" (got {value!r})"


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; `honed config show` lists the known ones"


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in _models_in(field.annotation):
            yield from _known_keys(part, f"{prefix}{name}.")


def _secret_keys(model: type[BaseModel], prefix: str = "") -> frozenset[str]:
    found = set()
    for name, field in model.model_fields.items():
        if SecretStr in (field.annotation, *typing.get_args(field.annotation)):
            found.add(prefix + name)
        for part in _models_in(field.annotation):
            found |= _secret_keys(part, f"{prefix}{name}.")
    return frozenset(found)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (types.UnionType, typing.Union):
        for part in typing.get_args(annotation):
            yield from _models_in(part)


def _leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _reaches(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True
