"""Strict reading of a JSON object: what is asked for must be there and of its type; each error names the field by its path.

Keys that nobody asks for are passed over: a newer release may have added them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from honed.kit.errors import InvalidArgument


class Fields:
    """A JSON object being read. Each accessor reads one key; raises InvalidArgument if it is missing or of another type."""

    def __init__(self, values: Mapping[str, Any], path: str) -> None:
        """`path` is where the object stands in its document, empty for the top."""
        self._values = values
        self._path = path

    def name(self, key: str) -> str:
        """The full path of `key`."""
        return f"{self._path}.{key}" if self._path else key

    def has(self, key: str) -> bool:
        """Whether there is such a key."""
        return key in self._values

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        """A string that matches `pattern` as a whole."""
        value = self._take(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        if pattern is not None and pattern.fullmatch(value) is None:
            raise InvalidArgument(self.name(key), f"{value[:80]!r} does not match {pattern.pattern}")
        return value

    def optional_text(self, key: str) -> str | None:
        """A string or null."""
        if self._take(key) is None:
            return None
        return self.text(key)

    def integer(self, key: str) -> int:
        """An integer from 0."""
        return self._integer(key, self._take(key))

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers from 0."""
        return tuple(self._integer(f"{key}[{i}]", value) for i, value in enumerate(self._list(key)))

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        return tuple(self._number(f"{key}[{i}]", value) for i, value in enumerate(self._list(key)))

    def numbers_by_name(self, key: str) -> dict[str, float]:
        """An object of finite numbers."""
        value = self._take(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return {name: self._number(f"{key}.{name}", number) for name, number in value.items()}

    def object(self, key: str) -> Fields:
        """A nested object."""
        return self._object(key, self._take(key))

    def objects(self, key: str) -> Iterator[Fields]:
        """A list of nested objects."""
        for i, value in enumerate(self._list(key)):
            yield self._object(f"{key}[{i}]", value)

    def _take(self, key: str) -> Any:
        if key not in self._values:
            raise InvalidArgument(self.name(key), "missing")
        return self._values[key]

    def _list(self, key: str) -> list[Any]:
        value = self._take(key)
        if not isinstance(value, list):
            raise self._wrong(key, "a list", value)
        return value

    def _object(self, key: str, value: Any) -> Fields:
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return Fields(value, self.name(key))

    def _integer(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(key, "an integer from 0", value)
        return value

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, "a finite number", value)
        return float(value)

    def _wrong(self, key: str, wanted: str, value: Any) -> InvalidArgument:
        return InvalidArgument(self.name(key), f"must be {wanted}, got {str(value)[:80]!r}")
