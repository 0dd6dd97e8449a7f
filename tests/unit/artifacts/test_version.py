"""Claims about the name of a version."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from honed.artifacts.version import VersionId
from honed.kit.errors import InvalidArgument

NUMBERS = st.integers(0, 10**18)


@given(NUMBERS, NUMBERS)
def test_a_label_reads_back_as_the_same_version(fence: int, step: int) -> None:
    version = VersionId(fence, step)
    assert VersionId.parse(version.label) == version
    assert str(version) == version.label


def test_a_newer_fence_is_newer_whatever_the_step() -> None:
    assert sorted([VersionId(2, 0), VersionId(1, 10), VersionId(1, 9)]) == [VersionId(1, 9), VersionId(1, 10), VersionId(2, 0)]


@pytest.mark.parametrize("label", ["", "1", "1.2.3", "a.b", "01.2", "1.-2", " 1.2", "1.2\n", "1." + "9" * 30])
def test_anything_else_is_not_a_label(label: str) -> None:
    with pytest.raises(InvalidArgument):
        VersionId.parse(label)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        VersionId(-1, 0)
