"""Claims about the figures of the demo's report."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from google.protobuf.timestamp_pb2 import Timestamp
from tests.support.tiny import make_tiny_model

from honed.demo.measures import busy_share, perplexity
from honed.models.loader import load_language_model
from honed.models.tokenizer import load_tokenizer
from honed.v1 import learner_pb2


def update(step: int, ended_at: float, seconds: float) -> learner_pb2.StepMetrics:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(ended_at * 1e9))
    return learner_pb2.StepMetrics(step=step, ended_at=stamp, values={"seconds": seconds})


def test_a_resumed_demo_counts_the_updates_of_its_own_loop_alone() -> None:
    before = [update(step, 1_000.0 + 6 * step, 5.0) for step in range(1, 31)]
    after = [update(30 + step, 5_000.0 + 8 * step, 6.0) for step in range(1, 11)]
    assert busy_share([*before, *after], 5_000.0, 5_080.0) == pytest.approx(0.75)


def test_an_update_that_reaches_over_the_start_or_the_end_counts_in_part() -> None:
    assert busy_share([update(1, 102.0, 6.0), update(2, 112.0, 4.0)], 100.0, 110.0) == pytest.approx(0.4)


def test_a_demo_that_was_finished_when_it_was_resumed_was_not_busy() -> None:
    assert busy_share([update(1, 50.0, 5.0)], 100.0, 100.5) == 0.0
    assert busy_share([], 100.0, 100.0) == 0.0


def test_perplexity_is_that_of_transformers_own_loss_with_every_token_of_all_texts_counted_once(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model", seed=1)
    model, tokenizer = load_language_model(directory).eval(), load_tokenizer(directory)
    start = tokenizer.prefix or (tokenizer.end,)
    losses, counts = [], []
    for text in ("a good film", "it was a film of some length, and not a bad one"):
        ids = torch.tensor([[*start, *tokenizer.encode(text, special_tokens=False)]])
        losses.append(float(model(input_ids=ids, labels=ids).loss.detach()))
        counts.append(ids.shape[1] - 1)
    expected = math.exp(sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts))
    assert perplexity(directory, ["a good film", "it was a film of some length, and not a bad one"]) == pytest.approx(expected)
