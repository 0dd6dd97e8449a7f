"""The collector rests while a service's modules are imported, and works again whatever comes of it."""

from __future__ import annotations

import gc

import pytest

from honed.cli.run import _no_collections


def test_nothing_is_collected_while_modules_are_imported() -> None:
    with _no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_a_module_that_cannot_be_imported_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), _no_collections():
        import honed.there_is_no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
    gc.unfreeze()
