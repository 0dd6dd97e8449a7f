"""Pure functions of tensors: the losses. No I/O, no clock, no settings.

A module is imported when it is first asked for (`objectives.value`), since algorithms are read where torch is not installed.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from honed.learner.objectives import advantage as advantage
    from honed.learner.objectives import direct as direct
    from honed.learner.objectives import group as group
    from honed.learner.objectives import policy_gradient as policy_gradient
    from honed.learner.objectives import preference as preference
    from honed.learner.objectives import value as value


def __getattr__(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise AttributeError(f"there are no objectives {name!r}") from error
