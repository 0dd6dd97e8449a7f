"""Claims about the measures of a comparison of versions, and the sampler behind it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import make_tiny_model

from honed.conductor.versions import differences
from honed.learner.jobs.compare import Sampling, continued, logprobs
from honed.models.loader import load_language_model
from honed.report.measures import best_of_kl, percentile, share_won


def row(left: str, right: str, kl: float) -> dict[str, Any]:
    def side(text: str) -> dict[str, Any]:
        words = text.split()
        return {"text": text, "token_ids": list(range(len(words))), "logprobs": [-1.0], "other_logprobs": [-1.0 - kl]}

    return {"left": side(left), "right": side(right)}


def test_differences_are_right_less_left_with_the_error_of_the_paired_mean() -> None:
    found = differences([row("a b", "a b c d", 0.5), row("a b", "a b", 1.5)], [1.0, 2.0], [2.0, 5.0])
    assert found["reward"] == pytest.approx(2.0)
    assert found["reward_stderr"] == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert found["tokens"] == pytest.approx(1.0)
    assert found["kl"] == pytest.approx(1.0)
    assert found["distinct2"] == pytest.approx(3 / 4 - 1 / 2)


def test_equal_scores_count_one_half_and_no_pairs_are_no_share() -> None:
    assert share_won([(1, 0), (0, 1), (1, 1), (2, 1)]) == pytest.approx(2.5 / 4)
    assert math.isnan(share_won([]))


@pytest.mark.parametrize("n", [1, 4, 16, 64])
def test_the_price_of_best_of_n_is_what_its_density_says(n: int) -> None:
    """The rank u of the best of n, uniform for one sample, has the density n u^(n-1)."""
    steps = 100_000
    ranks = [(i + 0.5) / steps for i in range(steps)]
    density = [n * u ** (n - 1) for u in ranks]
    assert best_of_kl(n) == pytest.approx(sum(d * math.log(d) for d in density if d) / steps, abs=1e-4)
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_a_response_depends_on_weights_and_seed_alone_and_ends_at_an_end_token(tmp_path: Path) -> None:
    one, other = (load_language_model(make_tiny_model(tmp_path / str(seed), seed=seed)) for seed in (1, 2))
    sampling = Sampling(24, 1.0, frozenset())

    def sampled(model: Any, ends: frozenset[int] = frozenset()) -> list[int]:
        return continued(model, [5, 6, 7], Sampling(24, 1.0, ends), torch.Generator().manual_seed(3))

    response = sampled(one)
    assert len(response) == sampling.max_tokens
    assert sampled(one) == response != sampled(other)
    ended = sampled(one, frozenset({response[4]}))
    assert ended == response[: response.index(response[4]) + 1]
    own = logprobs(one, [5, 6, 7], response, 1.0)
    assert len(own) == len(response)
    logits = one(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert own[0] == pytest.approx(float(logits.detach().log_softmax(-1)[response[0]]), abs=1e-5)
