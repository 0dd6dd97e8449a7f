"""Claims about packing."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from tests.unit.learner.samples import random_episodes

from honed.kit.errors import InvalidArgument
from honed.learner.data.batches import MicroBatch, Rows, micro_batches
from honed.learner.data.episode import Episode
from honed.models.packing import Branches, tokens_of

EPISODES = random_episodes(40, seed=3)
WIDTH = Rows.of(EPISODES).mask.shape[1]


@pytest.mark.parametrize("budget", [1, 13, 60, 10_000])
def test_every_action_token_is_packed_once_with_its_own_target(budget: int) -> None:
    packed = micro_batches(EPISODES, range(40), max_tokens=budget, width=WIDTH)
    seen = torch.cat([b.slots for b in packed])
    assert len(seen) == len(set(seen.tolist())) == sum(len(e.response) for e in EPISODES)
    targets = torch.full((40 * WIDTH,), -1)
    targets[seen] = torch.cat([b.targets for b in packed])
    for row, episode in enumerate(EPISODES):
        assert tuple(targets[row * WIDTH :][: len(episode.response)].tolist()) == episode.response


@pytest.mark.parametrize("budget", [1, 13, 60, 10_000])
def test_a_micro_batch_stays_in_its_budget_unless_one_episode_alone_exceeds_it(budget: int) -> None:
    for batch in micro_batches(EPISODES, range(40), max_tokens=budget, width=WIDTH):
        assert len(batch.tokens) <= budget or sum(count for count, _ in batch.runs) == 1


def test_each_state_is_the_token_before_its_target() -> None:
    for batch in micro_batches(EPISODES, range(40), max_tokens=60, width=WIDTH):
        following = batch.tokens[(batch.states + 1).clamp(max=len(batch.tokens) - 1)]
        response_goes_on = torch.cat([batch.slots.diff() == 1, torch.tensor([False])])
        assert torch.equal(following[response_goes_on], batch.targets[response_goes_on])


@pytest.mark.parametrize("budget", [13, 60, 10_000])
def test_sequences_stand_one_behind_the_other_shortest_first_and_each_one_counts_its_own_positions(budget: int) -> None:
    read = 0
    for batch in micro_batches(EPISODES, range(40), max_tokens=budget, width=WIDTH):
        lengths = [length for count, length in batch.runs for _ in range(count) if isinstance(length, int)]
        assert lengths == sorted(lengths)
        assert batch.positions.tolist() == [at for length in lengths for at in range(length)]
        read += len(batch.tokens)
    assert read == sum(len(e.prompt) + len(e.response) - 1 for e in EPISODES), "no token more than there are"


def sharing(*sizes: int, prompt: int = 20, length: int = 6) -> list[Episode]:
    """So many episodes to each prompt, responses of 1 to `length` tokens, whose ids tell them apart."""
    made = []
    for number, size in enumerate(sizes):
        for member in range(size):
            count = 1 + (member + length - 1) % length
            response = tuple(1000 * (number + 1) + 10 * member + at for at in range(count))
            shared = tuple(100 * (number + 1) + at for at in range(prompt))
            made.append(dataclasses.replace(EPISODES[0], prompt=shared, response=response, logprobs=(-1.0,) * count))
    return made


@pytest.mark.parametrize("budget", [1, 25, 40, 10_000])
def test_a_shared_prompt_stands_once_before_all_that_fit_behind_it(budget: int) -> None:
    episodes = sharing(4, 1, 8)
    packed = micro_batches(episodes, range(13), max_tokens=budget, width=6, share_prompts=True)
    targets = torch.full((13 * 6,), -1)
    for batch in packed:
        assert sum(tokens_of(batch.runs)) == len(batch.tokens) == len(batch.positions)
        targets[batch.slots] = batch.targets
        at, following = batch.positions[batch.states], batch.slots % 6
        assert torch.equal(at, 19 + following), "each token is predicted from the one before it in its sequence"
        first = following == 0
        assert torch.equal(batch.tokens[batch.states[first]] // 100, batch.targets[first] // 1000), "of its own prompt"
        assert torch.equal(batch.tokens[batch.states[~first]], batch.targets[~first] - 1)
    for row, episode in enumerate(episodes):
        assert tuple(targets[row * 6 :][: len(episode.response)].tolist()) == episode.response
    if budget == 10_000:
        assert [len(batch.tokens) for batch in packed] == [3 * 20 + sum(len(e.response) - 1 for e in episodes)]


def keys(batch: MicroBatch) -> int:
    """That attention holds of a micro-batch: each response of a group is padded to the longest, behind the prompt."""
    return sum(
        count * (len(shape.lengths) * (shape.prefix + max(shape.lengths)) if isinstance(shape, Branches) else shape)
        for count, shape in batch.runs
    )


def responses(prompt: int, *lengths: int, first: int = 0) -> list[Episode]:
    """Responses of these lengths to one prompt."""
    return [
        dataclasses.replace(EPISODES[0], prompt=(first,) * prompt, response=(1,) * count, logprobs=(-1.0,) * count)
        for count in lengths
    ]


def test_a_response_that_is_much_longer_than_its_group_is_read_alone() -> None:
    # Padded to the longest, two groups would fit in one micro-batch and hold 81,888 keys.
    episodes = [each for first in (1, 2) for each in responses(512, *[100] * 7, 2048, *[100] * 8, first=first)]
    shared = micro_batches(episodes, range(32), max_tokens=8192, width=2048, share_prompts=True)
    assert [batch.runs for batch in shared] == [((2, Branches(512, (99,) * 15)), (1, 2559)), ((1, 2559),)]


@pytest.mark.parametrize("seed", range(5))
def test_attention_holds_no_more_than_twice_what_it_would_of_the_same_responses_alone(seed: int) -> None:
    source = random.Random(seed)
    lengths = [round(2 ** source.uniform(1, 11)) for _ in range(24)]
    episodes = responses(40, *lengths)
    (batch,) = micro_batches(episodes, range(24), max_tokens=1 << 40, width=2048, share_prompts=True)
    assert any(isinstance(shape, Branches) for _, shape in batch.runs)
    assert keys(batch) <= 2 * sum(40 + length - 1 for length in lengths)
    assert len(batch.slots) == sum(lengths)


def test_keys_count_against_the_budget_where_a_long_prompt_has_many_short_responses() -> None:
    # All 64 are 1,000 + 64 x 9 tokens, and 64 x 1,009 keys.
    packed = micro_batches(responses(1000, *[10] * 64), range(64), max_tokens=2048, width=10, share_prompts=True)
    assert all(keys(batch) <= 4 * 2048 for batch in packed)
    assert [batch.runs for batch in packed[1:]] == [((1, Branches(1000, (9,) * 8)),)] * 7


def test_prompts_that_save_too_little_stand_with_each_response_as_they_do_without_sharing() -> None:
    # Of the groups of four it saves 30 of some 60 tokens, of the large one 33 of some 400.
    episodes = sharing(4, 4, prompt=10) + sharing(34, prompt=1, length=20)
    shared, alone = (
        micro_batches(episodes, range(42), max_tokens=500, width=20, share_prompts=share) for share in (True, False)
    )
    assert [batch.runs for batch in shared] == [batch.runs for batch in alone]
    assert all(torch.equal(one.states, other.states) for one, other in zip(shared, alone, strict=True))


def test_packing_is_deterministic_and_does_not_depend_on_the_order_of_the_choice() -> None:
    one = micro_batches(EPISODES, [5, 1, 9, 30], max_tokens=20, width=WIDTH)
    two = micro_batches(EPISODES, [30, 9, 5, 1], max_tokens=20, width=WIDTH)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.slots, b.slots)


def test_detail_3_masks_come_from_lengths_so_a_token_that_equals_the_filler_is_an_action() -> None:
    zeros = [dataclasses.replace(e, response=(0,) * len(e.response)) for e in EPISODES]
    packed = micro_batches(zeros, range(40), max_tokens=60, width=WIDTH)
    assert sum(len(b.targets) for b in packed) == sum(len(e.response) for e in EPISODES)
    assert torch.equal(Rows.of(zeros).mask, Rows.of(EPISODES).mask)
    assert bool(Rows.of(zeros).mask[:, 0].all())  # at least one action position a response, whatever was sampled


def test_the_masked_share_shows_responses_that_collapse() -> None:
    full = dataclasses.replace(EPISODES[0], response=(1,) * 10, logprobs=(-1.0,) * 10)
    short = dataclasses.replace(EPISODES[0], response=(1,), logprobs=(-1.0,))
    assert Rows.of([full, full]).empty_share(10) == 0.0
    assert Rows.of([full, short]).empty_share(10) == pytest.approx(0.45)
    assert Rows.of([short, short]).empty_share(10) == pytest.approx(0.9), "all of them collapse"
    assert Rows.of([full, full]).empty_share(40) == pytest.approx(0.75)


@pytest.mark.parametrize("most", [None, 4])
def test_without_a_bound_that_holds_the_masked_share_goes_by_the_longest_response(most: int | None) -> None:
    full = dataclasses.replace(EPISODES[0], response=(1,) * 10, logprobs=(-1.0,) * 10)
    short = dataclasses.replace(EPISODES[0], response=(1,), logprobs=(-1.0,))
    assert Rows.of([full, short]).empty_share(most) == pytest.approx(0.45)
    assert Rows.of([short, short]).empty_share() == 0.0


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="max_tokens"):
        micro_batches(EPISODES, [0], max_tokens=0, width=WIDTH)
