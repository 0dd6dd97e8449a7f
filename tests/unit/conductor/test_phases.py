"""Which phases a run goes through, and which it cannot."""

from typing import Any

import pytest

from honed.config import RunSettings

PEOPLE = {"scorers": [{"name": "people", "kind": "reward_model", "source": "trained"}]}
BEST_OF_4 = {"data": {"evaluation": {"best_of": 4}}}
ALL = ("pretrain", "sft", "reward_model", "online")


def settings(phases: Any = None, **tree: Any) -> RunSettings:
    return RunSettings.model_validate({"run": "r", **({} if phases is None else {"phases": phases}), **tree})


def gone_through(run: RunSettings) -> list[str]:
    return [phase for phase in ALL if run.goes_through(phase)]


def test_a_run_that_names_none_goes_through_what_its_data_and_scorers_call_for() -> None:
    assert gone_through(settings()) == ["pretrain", "online"]
    assert gone_through(settings(reward=PEOPLE, data={"demonstrations": ["a.jsonl"]})) == list(ALL)
    assert gone_through(settings(conductor={"start_from": "model"})) == ["online"]


def test_any_may_be_left_out() -> None:
    shown = {"demonstrations": ["a.jsonl"]}
    assert gone_through(settings(["pretrain", "sft"], data=shown)) == ["pretrain", "sft"]
    assert gone_through(settings(["pretrain", "online"], data=shown)) == ["pretrain", "online"]
    assert gone_through(settings(["reward_model"], conductor={"start_from": "m"}, reward=PEOPLE)) == ["reward_model"]


def test_online_may_name_the_algorithm() -> None:
    run = settings(["pretrain", {"online": "grpo"}], conductor={"samples_per_prompt": 4})
    assert (run.phases, run.learner.algorithm) == (("pretrain", "online"), "grpo")
    assert settings([{"online": "dpo"}], conductor={"start_from": "m"}, learner={"algorithm": "dpo"}).learner.algorithm == "dpo"
    with pytest.raises(ValueError, match=r"phases: online is dpo, and learner\.algorithm ppo: name one"):
        settings(["pretrain", {"online": "dpo"}], learner={"algorithm": "ppo"})
    with pytest.raises(ValueError, match=r"learner\.algorithm: there is no 'grop'"):
        settings(["pretrain", {"online": "grop"}])


@pytest.mark.parametrize(
    ("phases", "tree", "reason"),
    [
        (["online", "pretrain"], {}, "must each be there once, in the order pretrain, sft"),
        (["pretrain", "pretrain"], {}, "must each be there once"),
        (["pretrain", "online"], {"conductor": {"start_from": "m"}}, "leave one of them out"),
        (["online"], {}, r"without pretrain, conductor\.start_from must name"),
        (["pretrain", "sft"], {}, r"sft has nothing to learn from: name data\.demonstrations"),
        (["pretrain", "reward_model"], {}, "no scorer reads what reward_model trains"),
        (["pretrain", "online"], {"reward": PEOPLE}, "reward_model is left out: name the artifact"),
        (["pretrain", "training"], {}, "phases"),
        (["pretrain", {"sft": "x"}], {}, "phases"),
        ("online", {}, "phases"),
        (["pretrain"], BEST_OF_4, r"data\.evaluation\.best_of: the best is chosen by the run's reward, and this run has none"),
        (["pretrain"], {**BEST_OF_4, "reward": PEOPLE}, r"best_of: .* reward_model where one of them is `trained`"),
        (
            ["pretrain", "reward_model"],
            {**BEST_OF_4, "reward": PEOPLE, "generation": {"max_samples": 3}},
            r"data\.evaluation\.best_of: 4 are over generation\.max_samples = 3",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(phases: Any, tree: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        settings(phases, **tree)
