from itertools import islice

import pytest
import torch

from honed.kit.errors import InvalidArgument
from honed.learner.data.texts import IGNORED, Demonstration, demonstration_batches, packed_batches, pad_right

TEXTS = [[i] * (1 + i % 3) for i in range(1, 13)]  # 24 tokens and 12 separators


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_epoch_packs_whole_texts_each_behind_a_separator():
    batches = list(islice(packed_batches(TEXTS, separator=0, width=6, rows=3, rng=rng()), 2))
    stream = torch.cat([batch.tokens.flatten() for batch in batches]).tolist()
    assert len(stream) == sum(len(text) + 1 for text in TEXTS)
    assert sorted(stream) == sorted([0] * 12 + [token for text in TEXTS for token in text])
    assert stream[0] == 0
    assert torch.equal(batches[0].tokens, batches[0].labels)
    assert batches[0].predictions == 3 * 5


def test_epochs_differ_and_repeat_with_the_seed():
    first, again = (list(islice(packed_batches(TEXTS, separator=0, width=6, rows=3, rng=rng(1)), 4)) for _ in range(2))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].tokens, first[2].tokens)


def test_too_few_texts_are_refused_at_once():
    with pytest.raises(InvalidArgument, match="36 tokens do not fill"):
        packed_batches(TEXTS, separator=0, width=37, rows=1, rng=rng())


def test_only_the_response_and_its_end_have_a_loss():
    items = [Demonstration([5, 6], [7, 8]), Demonstration([5], [9])]
    batch = next(demonstration_batches(items, separator=0, width=10, rows=2, rng=rng()))
    rows = {tuple(tokens): labels for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)}
    assert rows == {
        (0, 5, 6, 7, 8, 0): [IGNORED, IGNORED, IGNORED, 7, 8, 0],
        (0, 5, 9, 0, 0, 0): [IGNORED, IGNORED, 9, 0, IGNORED, IGNORED],  # padding has no loss, though it is the separator
    }


def test_a_long_response_loses_its_end_and_a_long_prompt_is_refused():
    batch = next(demonstration_batches([Demonstration([5], [6] * 20)], separator=0, width=4, rows=1, rng=rng()))
    assert batch.tokens.tolist() == [[0, 5, 6, 6]]
    with pytest.raises(InvalidArgument, match=r"demonstrations\[0\]\.prompt"):
        demonstration_batches([Demonstration([5] * 3, [6])], separator=0, width=4, rows=1, rng=rng())
    with pytest.raises(InvalidArgument, match="none"):
        demonstration_batches([], separator=0, width=4, rows=1, rng=rng())


def test_padding_stands_on_the_right():
    assert pad_right([[1], [2, 3]], filler=9).tolist() == [[1, 9], [2, 3]]
