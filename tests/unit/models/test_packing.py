"""Which sequences share a forward pass."""

from hypothesis import given
from hypothesis import strategies as st

from honed.models.packing import Branches, fill, pack, runs_of, tokens_of

lengths = st.lists(st.integers(1, 400), max_size=80)


@given(lengths, st.integers(1, 2000))
def test_each_sequence_is_in_one_group_and_no_group_passes_the_budget(lengths: list[int], budget: int) -> None:
    groups = pack(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        size = len(group) * max(lengths[index] for index in group)
        assert size <= budget or len(group) == 1


@given(lengths)
def test_padding_is_a_small_share(lengths: list[int]) -> None:
    for group in pack(lengths, 100_000):
        padded = len(group) * max(lengths[index] for index in group)
        assert padded - sum(lengths[index] for index in group) <= 128 + padded / 8


def test_equal_lengths_share_one_pass() -> None:
    assert pack([32] * 256, 8192) == [list(range(256))]


@given(lengths, st.integers(1, 2000))
def test_without_padding_a_group_ends_where_one_more_sequence_would_pass_the_budget(lengths: list[int], budget: int) -> None:
    groups = fill(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in group) for group in groups]
    assert all(size <= budget or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    for size, following in zip(sizes, groups[1:], strict=False):
        assert size + lengths[following[0]] > budget
    assert [lengths[index] for group in groups for index in group] == sorted(lengths)


def test_runs_are_neighbours_of_equal_length() -> None:
    assert runs_of([3, 3, 5, 5, 5, 9]) == ((2, 3), (3, 5), (1, 9))
    assert runs_of([]) == ()


def test_groups_of_one_shape_are_a_run_too_and_count_their_beginning_once() -> None:
    shape = Branches(10, (3, 2))
    runs = runs_of([4, shape, Branches(10, (3, 2)), Branches(10, (2, 3)), 15])
    assert runs == ((1, 4), (2, shape), (1, Branches(10, (2, 3))), (1, 15))
    assert tokens_of(runs) == [4, 30, 15, 15]
