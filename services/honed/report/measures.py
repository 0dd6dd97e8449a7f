"""Small measures over texts, scores and pushes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

from honed.v1 import learner_pb2


def distinct_n(sequences: Iterable[Sequence[Hashable]], n: int = 2) -> float:
    """Different n-grams over all n-grams of all sequences, from 0 to 1 (Li et al. 2016, distinct-n).

    Compare it between equally many and equally long sequences only: it falls as the text grows. 0 when there is no n-gram.
    """
    grams = [tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def share_won(scores: Iterable[tuple[float, float]]) -> float:
    """The share of pairs (score of the chosen, score of the rejected) that are in order; equal scores count one half.

    NaN when there is no pair.
    """
    won, total = 0.0, 0
    for chosen, rejected in scores:
        won += 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0
        total += 1
    return won / total if total else math.nan


def best_of_kl(n: int) -> float:
    """Nats between the best of n samples and one sample of the same policy: log n - (n - 1) / n (Stiennon et al. 2020).

    Exact where no two responses have the same reward and each response is unlikely; an upper bound otherwise.
    """
    return math.log(n) - (n - 1) / n


def pauses_ms(pushes: Iterable[learner_pb2.Push]) -> list[float]:
    """How long requests stood still, of all pushes and generators, in milliseconds."""
    return [pause * 1e3 for push in pushes for pause in push.pauses_seconds]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, by linear interpolation; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of none."""
    return math.fsum(values) / len(values) if values else math.nan
