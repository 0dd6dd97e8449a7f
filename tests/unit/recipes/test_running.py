"""What a recipe's figures are made of, beside what a whole run gives."""

import pytest

from honed.recipes.running import _curves, _examples
from honed.v1 import learner_pb2


def update(**values):
    return learner_pb2.StepMetrics(step=1, values=values)


@pytest.mark.parametrize(
    ("values", "examples"),
    [({"episodes": 64.0, "pairs": 16.0}, 64), ({"pairs": 12.0}, 12), ({"responses": 128.0}, 128), ({"loss": 0.5}, 0)],
    ids=["rollouts, and pairs of them", "pairs of judgements", "single responses", "neither"],
)
def test_an_update_learned_from_episodes_pairs_or_responses(values, examples):
    assert _examples(update(**values)) == examples


def test_curves_are_of_the_metrics_that_the_algorithm_has():
    updates = [update(loss=0.5, accuracy=0.75, clip_fraction=0.1), update(loss=0.25)]
    assert _curves(updates) == {"loss": [0.5, 0.25], "accuracy": [0.75]}
