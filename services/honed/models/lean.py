"""Has transformers start without what no language model needs.

Where scikit-learn and SciPy are installed (the demo's judge is made of them), transformers imports both along with any model:
for the curves of assisted generation, and for losses of object detection. They take a quarter of the time in which a service
starts. And to know under which names packages were installed, it reads the lists of files of all of them, though those that a
language model needs are called as they are imported. Import this before transformers; what others have imported already is
left alone.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any, Final

_NOT_NEEDED: Final = ("sklearn", "scipy")


def _import_transformers() -> None:
    hidden = [name for name in _NOT_NEEDED if name not in sys.modules]
    # None is Python's own way to say that a module cannot be imported.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    metadata: Any = importlib.metadata
    names_of_packages, metadata.packages_distributions = metadata.packages_distributions, dict
    try:
        from transformers.utils import is_scipy_available, is_sklearn_available

        for is_available in (is_scipy_available, is_sklearn_available):
            is_available()  # it looks once, and remembers the answer
    finally:
        metadata.packages_distributions = names_of_packages
        for name in hidden:
            del sys.modules[name]


_import_transformers()
