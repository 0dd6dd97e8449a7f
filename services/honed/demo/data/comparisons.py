"""Makes comparisons from single ratings: two texts, one rating of each drawn at random, ties dropped.

A mean over raters would hide that people disagree; a single rating keeps it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from honed.demo.data.ratings import RatedText
from honed.kit.errors import InvalidArgument


@dataclass(frozen=True)
class Comparison:
    """One person's rating of `chosen` was higher than another's of `rejected`."""

    chosen: RatedText
    rejected: RatedText
    chosen_rating: int
    rejected_rating: int


def draw_comparisons(texts: Sequence[RatedText], *, seed: int, sitting: int = 2) -> Iterator[Comparison]:
    """Yields comparisons without end; take as many as needed with `itertools.islice`.

    Texts are dealt in rounds: each round shuffles all of them and deals them out in sittings, so that every text is compared
    equally often. Within a sitting every pair of texts is compared once, each time by freshly drawn single ratings; pairs
    that tie are dropped. A sitting of 2 gives independent pairs. A larger one lets a trainer that reads the comparisons in
    order serve many of them from one pass over a text.

    Args:
        texts: rated texts, at least one sitting of them.
        seed: of the draws: the same texts, sitting and seed give the same comparisons.
        sitting: how many texts are compared with each other, at least 2.

    Raises:
        InvalidArgument: when a sitting cannot be filled, or all ratings are equal, so that nothing but ties could come.
    """
    if sitting < 2:
        raise InvalidArgument("data.sitting", f"a sitting needs at least 2 texts, not {sitting}")
    if len(texts) < sitting:
        raise InvalidArgument("data.sitting", f"{len(texts)} texts cannot fill a sitting of {sitting}")
    if len({rating for rated in texts for rating in rated.ratings}) < 2:
        raise InvalidArgument("data.texts", "all ratings are equal: every comparison would be a tie")
    return _draw(texts, random.Random(seed), sitting)


def _draw(texts: Sequence[RatedText], rng: random.Random, sitting: int) -> Iterator[Comparison]:
    while True:
        order = rng.sample(texts, len(texts))
        for start in range(0, len(order) - sitting + 1, sitting):
            for left, right in combinations(order[start : start + sitting], 2):
                left_rating, right_rating = rng.choice(left.ratings), rng.choice(right.ratings)
                if left_rating > right_rating:
                    yield Comparison(left, right, left_rating, right_rating)
                elif right_rating > left_rating:
                    yield Comparison(right, left, right_rating, left_rating)
