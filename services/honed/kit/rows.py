"""Reads a stored row into a dataclass, so that two releases can share what is stored.

The release before meets rows of a newer one while an upgrade is under way, and after one that was taken back. A newer release
may add a key that has a default; what it must not be read without, it says by another format number or schema.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Row = TypeVar("_Row", bound="DataclassInstance")


def read_row(kind: type[_Row], row: Any) -> _Row:
    """Makes a `kind` of a JSON object; keys that `kind` has no field for are passed over.

    Raises:
        TypeError: `row` is no object, or lacks a field that has no default.
    """
    if not isinstance(row, dict):
        raise TypeError(f"{kind.__name__} is read from a JSON object, not from {str(row)[:80]!r}")
    return kind(**{field.name: row[field.name] for field in fields(kind) if field.init and field.name in row})
