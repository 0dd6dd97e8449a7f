"""Options whose class depends on another key of the run file: an algorithm's, a scorer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from honed.kit.errors import InvalidArgument
from honed.settings import Section

Options = TypeVar("Options", bound=Section)


def read_options(kind: type[Options], given: Mapping[str, Any], *, field: str, owner: str) -> Options:
    """Reads options of a known class.

    Args:
        kind: Their class.
        given: What the run file says.
        field: Where it says it.
        owner: What has the options, for the error.

    Raises:
        InvalidArgument: There is no such option, or a value cannot be; names it, and the options that there are.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise refused_option(error, field, owner, list(kind.model_fields)) from None


def refused_option(error: ValidationError, field: str, owner: str, known: list[str]) -> InvalidArgument:
    """The first thing that is wrong with options, with the place of it."""
    first = error.errors()[0]
    place = ".".join([field, *map(str, first["loc"])])
    return InvalidArgument(place, f"{first['msg']}; {owner} has the options: {', '.join(known) or 'none'}")
