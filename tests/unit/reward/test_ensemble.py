"""Ensembles of reward models: real tiny models, combined."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.unit.reward.support import edit_config, make_reward_model

from honed.artifacts.manifest import Lineage
from honed.artifacts.reward_models import RewardModelStore
from honed.kit.errors import FailedPrecondition
from honed.models.tokenizer import TextTokenizer, load_tokenizer
from honed.reward.ensemble import EnsembleScorer
from honed.reward.main import make_builder
from honed.reward.messages import score_messages
from honed.reward.model_scorer import ModelScorer
from honed.reward.registry import ScorerRegistry
from honed.reward.reward import Term, WeightedSum
from honed.reward.scorer import ScorerInput
from honed.reward.settings import EnsembleOptions, RewardSettings, ScorerSettings
from honed.reward.sources import ModelSources


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("members")
    return [make_reward_model(root / str(seed), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def policy(models: list[Path]) -> TextTokenizer:
    return load_tokenizer(models[0])


def inputs(policy: TextTokenizer) -> list[ScorerInput]:
    texts = ["short", "a somewhat longer response", "x"]
    return [ScorerInput(policy, prompt="the prompt", response=text) for text in texts]


def ensemble(models: Sequence[Path], policy: TextTokenizer, combine: str = "mean", k: float | None = None) -> EnsembleScorer:
    options = EnsembleOptions.model_validate({"members": [str(path) for path in models], "combine": combine, "k": k})
    return EnsembleScorer("people", [ModelScorer("people", path, policy) for path in models], options)


@pytest.mark.parametrize(
    ("combine", "k"), [("mean", None), ("minimum", None), ("mean_minus_std", None), ("mean_minus_std", 2.5)]
)
def test_members_are_combined_and_their_disagreement_is_told(
    models: list[Path], policy: TextTokenizer, combine: str, k: float | None
) -> None:
    batch = inputs(policy)
    columns = [[output.value for output in ModelScorer("m", path, policy).score(batch)] for path in models]
    outputs = ensemble(models, policy, combine, k).score(batch)
    for output, *values in zip(outputs, *columns, strict=True):
        mean, deviation = statistics.fmean(values), statistics.pstdev(values)
        expected = {"mean": mean, "minimum": min(values), "mean_minus_std": mean - (1.0 if k is None else k) * deviation}
        assert output.members == pytest.approx(values, abs=1e-6)
        assert output.deviation == pytest.approx(deviation, abs=1e-6)
        assert deviation > 1e-3, "models of different seeds disagree"
        assert output.value == pytest.approx(expected[combine], abs=1e-6)


def test_the_reply_carries_members_and_deviation_and_the_sum_the_combined_value(
    models: list[Path], policy: TextTokenizer
) -> None:
    scorer = ensemble(models, policy, "minimum")
    [reward, *_] = WeightedSum([Term(scorer, 0.5)]).score(inputs(policy))
    [message] = score_messages(reward)
    assert len(message.members) == 3
    assert message.value == min(message.members)
    assert message.deviation == pytest.approx(statistics.pstdev(message.members))
    assert reward.value == 0.5 * message.value


def test_members_of_one_tokenizer_tokenise_once(
    models: list[Path], policy: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [Path(shutil.copytree(path, tmp_path / path.name)) for path in models]
    for path in others:  # another digest than the policy's: these read the text in their own tokens
        (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text() + "\n")
    counted: list[str] = []
    encode = TextTokenizer.encode

    def counting(self: TextTokenizer, text: str, *, special_tokens: bool) -> list[int]:
        counted.append(text)
        return encode(self, text, special_tokens=special_tokens)

    alone = ensemble(others[:2], policy)
    both = ensemble([others[0], others[1], models[2]], policy)
    monkeypatch.setattr(TextTokenizer, "encode", counting)
    outputs = alone.score(inputs(policy))
    assert sorted(counted) == sorted(["the prompt"] * 3 + [sample.response or "" for sample in inputs(policy)])
    expected = ensemble(models, policy).score(inputs(policy))
    assert [output.members for output in both.score(inputs(policy))] == [
        pytest.approx(output.members, abs=1e-6) for output in expected
    ]
    assert [output.members for output in outputs] == [pytest.approx(output.members[:2], abs=1e-6) for output in expected]


def test_the_shortest_member_bounds_the_ensemble_and_what_it_leaves_out_is_told(
    models: list[Path], policy: TextTokenizer, tmp_path: Path
) -> None:
    short = make_reward_model(tmp_path / "short", 7, positions=8)
    scorer = ensemble([models[0], short], policy)
    assert scorer.max_tokens == 8
    whole = ScorerInput(policy, prompt="the prompt", response="a response of many tokens of this tokenizer")
    [output] = scorer.score([whole])
    assert output.truncated_tokens == len(whole.prompt_ids) + len(whole.response_ids) - 8


def test_the_version_changes_with_the_members_and_with_how_they_are_combined(
    models: list[Path], policy: TextTokenizer, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(models[1], tmp_path / "changed"))
    edit_config(changed, reward_bias=0.5)
    scorers = [
        ensemble(models[:2], policy),
        ensemble(models, policy),
        ensemble([models[0], changed], policy),
        ensemble(models[:2], policy, "minimum"),
        ensemble(models[:2], policy, "mean_minus_std"),
        ensemble(models[:2], policy, "mean_minus_std", 0.5),
    ]
    assert len({scorer.version for scorer in scorers}) == len(scorers)
    assert ensemble(models[:2], policy).version == scorers[0].version


def test_the_same_model_twice_is_refused(models: list[Path], policy: TextTokenizer, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models[0], tmp_path / "copy"))
    with pytest.raises(
        FailedPrecondition, match=r"scorer 'people': .* are the same model; train the second with another `seed`"
    ):
        ensemble([models[0], models[1], copy], policy)


async def test_members_come_from_the_store_and_from_directories_and_none_is_promoted(
    models: list[Path], policy: TextTokenizer, tmp_path: Path
) -> None:
    store = RewardModelStore(str(tmp_path / "store"), "r", "trained")
    store.publish_next(models[0], Lineage())
    settings = ScorerSettings(
        name="people", kind="ensemble", options={"members": ["artifact:trained/0.1", str(models[1])], "combine": "minimum"}
    )
    section = RewardSettings(scorers=(settings,))
    sources = ModelSources(str(tmp_path / "store"), "r", tmp_path / "copies", [])
    registry = ScorerRegistry(section.scorers)
    await registry.start(make_builder(section, policy, sources), {"people": (settings.source, None)})
    [reward, *_] = registry.serving.score(inputs(policy))
    expected = ensemble(models[:2], policy, "minimum")
    assert reward.value == pytest.approx(expected.score(inputs(policy))[0].value)
    assert registry.serving_version("people") == expected.version
    with pytest.raises(FailedPrecondition, match="'people' is an ensemble; name its new members in the run file"):
        await registry.load("people", str(models[2]))
