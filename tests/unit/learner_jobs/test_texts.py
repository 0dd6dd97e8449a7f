from itertools import islice

import pytest

from honed.kit.errors import InvalidArgument
from honed.learner.data.continuation import Demonstration
from honed.learner.sources.epochs import Epochs, Position
from honed.learner.sources.texts import demonstrations, packed_texts

TEXTS = [[i] * (1 + i % 3) for i in range(1, 13)]  # 24 tokens and 12 separators


def tokens_of(batch):
    return [[*item.prompt, *item.response] for item in batch]


def taken(source, count):
    return list(islice(iter(source.next, None), count))


def test_an_epoch_packs_whole_texts_each_behind_a_separator():
    batches = taken(packed_texts(TEXTS, separator=0, width=6, rows=3, seed=0), 2)
    stream = [token for batch in batches for row in tokens_of(batch) for token in row]
    assert len(stream) == sum(len(text) + 1 for text in TEXTS)
    assert sorted(stream) == sorted([0] * 12 + [token for text in TEXTS for token in text])
    assert stream[0] == 0
    whole = " ".join(map(str, stream)) + " 0"
    assert all(f"0 {' '.join(map(str, text))} 0" in whole for text in TEXTS)
    assert all(len(item.prompt) == 1 and len(item.response) == 5 for batch in batches for item in batch)


def test_epochs_differ_and_repeat_with_the_seed():
    first, again, other = (
        [tokens_of(batch) for batch in taken(packed_texts(TEXTS, separator=0, width=6, rows=3, seed=seed), 4)]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first[:2] != first[2:]
    assert first != other


def test_too_few_texts_are_refused_at_once():
    with pytest.raises(InvalidArgument, match="36 tokens do not fill"):
        packed_texts(TEXTS, separator=0, width=37, rows=1, seed=0)
    with pytest.raises(InvalidArgument, match="nothing to predict"):
        packed_texts(TEXTS, separator=0, width=1, rows=1, seed=0)


def test_demonstrations_come_once_an_epoch_and_the_last_batch_may_be_smaller():
    items = [Demonstration([5], [number]) for number in range(5)]
    source = demonstrations(items, rows=2, seed=3, epochs=2)
    epochs = [taken(source, 3), taken(source, 4)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[2, 2, 1], [2, 2, 1]]
    for epoch in epochs:
        assert sorted(item.response[0] for batch in epoch for item in batch) == [0, 1, 2, 3, 4]
    assert epochs[0] != epochs[1]
    assert source.next() is None
    with pytest.raises(InvalidArgument):
        demonstrations([], rows=2, seed=3)


def test_a_source_goes_on_from_any_place_in_it():
    def made():
        return Epochs(7, lambda order: [order[i : i + 2] for i in range(0, 7, 2)], seed=4, epochs=3)

    source, seen = made(), []
    while True:
        position = source.position
        if (batch := source.next()) is None:
            break
        seen.append((position, batch))
    assert len(seen) == 12
    assert seen[-1][0] == Position(2, 3)
    for number in (0, 3, 4, 11):
        later = made()
        later.go_to(seen[number][0])
        assert taken(later, 12) == [batch for _, batch in seen[number:]]
