"""What a run does otherwise than its recipe: `learner.max_staleness=0` and the like, as a command line gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from honed.kit.errors import InvalidArgument


def changed_tree(changes: Sequence[str]) -> dict[str, Any]:
    """The tree of settings that changes make, each `SECTION.KEY=VALUE` with a value as in a run file.

    Raises:
        InvalidArgument: One is no such thing, or two are of one key.
    """
    tree: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        *sections, name = key.strip().split(".")
        if not equals or not all((*sections, name)):
            raise InvalidArgument("--set", f"{change!r} is no SECTION.KEY=VALUE, such as learner.max_staleness=0")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise InvalidArgument("--set", f"{change!r} is inside of what another one sets")
        if name in place:
            raise InvalidArgument("--set", f"{change!r}: another one sets that, or a part of it")
        try:
            place[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidArgument("--set", f"{change!r}: the value is not YAML ({error})") from error
    return tree
