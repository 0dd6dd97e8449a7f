"""What a configuration may say of what a reward model's head reads."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from honed.kit.errors import DataLoss, FailedPrecondition
from honed.models.pooling import Pooling

HERE = Path("model")


@pytest.mark.parametrize("pooling", [Pooling(), Pooling("mean"), Pooling("last", (2, 1)), Pooling("mean", (3,))])
def test_what_is_written_is_read(pooling):
    config = SimpleNamespace(num_hidden_layers=3, reward_bias=0.5, reward_read="mean", reward_layers=[1])
    pooling.write(config)
    assert Pooling.of_config(vars(config), HERE) == pooling


def test_a_model_of_transformers_own_kind_has_no_such_fields_and_needs_none():
    config = SimpleNamespace(reward_read="mean")
    Pooling().write(config)
    assert vars(config) == {}
    assert Pooling.of_config({}, HERE) == Pooling()
    assert (Pooling().width(8), Pooling("mean", (1, 2)).width(8)) == (8, 16)


@pytest.mark.parametrize(
    ("config", "error", "named"),
    [
        ({"reward_read": "first"}, FailedPrecondition, "reward_read is 'first'"),
        ({"reward_scale": 2}, FailedPrecondition, "reward_scale, which this release"),
        ({"reward_layers": [0]}, DataLoss, "reward_layers is"),
        ({"reward_layers": [1, 1]}, DataLoss, "reward_layers is"),
        ({"reward_layers": [True]}, DataLoss, "reward_layers is"),
        ({"reward_layers": "12"}, DataLoss, "reward_layers is"),
        ({"reward_layers": [4], "num_hidden_layers": 3}, DataLoss, "has 4, and the model 3"),
        ({"reward_layers": [4], "n_layer": 3}, DataLoss, "has 4, and the model 3"),
    ],
)
def test_what_cannot_be_or_is_not_known_is_refused_by_name(config, error, named):
    with pytest.raises(error, match=named):
        Pooling.of_config(config, HERE)
