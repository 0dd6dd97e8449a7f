"""Keeps scikit-learn and SciPy out of processes that only want a language model.

Where they are installed (the demo's judge is made of them), transformers imports both along with any model: for the curves of
assisted generation, and for losses of object detection. Nothing here uses either, and they take a quarter of the time in which
a service starts. Import this before transformers; what has been imported by others already is left alone.
"""

from __future__ import annotations

import sys
from typing import Final

_NOT_NEEDED: Final = ("sklearn", "scipy")


def _import_transformers() -> None:
    hidden = [name for name in _NOT_NEEDED if name not in sys.modules]
    # None is Python's own way to say that a module cannot be imported.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        from transformers.utils import is_scipy_available, is_sklearn_available

        for is_available in (is_scipy_available, is_sklearn_available):
            is_available()  # it looks once, and remembers the answer
    finally:
        for name in hidden:
            del sys.modules[name]


_import_transformers()
