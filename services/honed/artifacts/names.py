"""What a run, a reward model and a file of a version may be called, so that a name is safe as a part of a path."""

from __future__ import annotations

import re
from typing import Final

from honed.kit.errors import InvalidArgument

MANIFEST_NAME: Final = "manifest.json"
SUFFIXES: Final = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".md"})
"""What a version may hold: data and weights. No Python source, no pickle formats."""
RUN: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}")


def check_run(run: str) -> str:
    """Returns `run` if it may name a directory.

    Raises:
        InvalidArgument: If it is not lower-case letters, digits and hyphens, at most 64.
    """
    if RUN.fullmatch(run) is None:
        raise InvalidArgument("run", f"{run!r} must be lower-case letters, digits and hyphens, at most 64, no leading hyphen")
    return run


def is_name(name: str) -> bool:
    """Whether `name` may name a reward model."""
    return NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """Returns `name` if it may name a reward model.

    Raises:
        InvalidArgument: If it is not lower-case letters, digits, `_` and `-`, at most 64.
    """
    if not is_name(name):
        raise InvalidArgument("name", f"{name!r} must be a lower-case letter, then letters, digits, '_' and '-', at most 64")
    return name


def check_path(path: str, where: str = "path") -> str:
    """Returns `path` if it stays inside its directory and is of a kind that a version may hold.

    Raises:
        InvalidArgument: If it is absolute, climbs out, hides, or has a suffix outside `SUFFIXES`.
    """
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in {"", ".."} or part.startswith(".") for part in parts):
        raise InvalidArgument(where, f"{path!r} is not a plain relative path inside the version's directory")
    if path == MANIFEST_NAME:
        raise InvalidArgument(where, f"{MANIFEST_NAME} cannot list itself")
    suffix = "." + parts[-1].rpartition(".")[2]
    if suffix not in SUFFIXES:
        raise InvalidArgument(where, f"{path!r}: a version holds only {', '.join(sorted(SUFFIXES))} files")
    return path
