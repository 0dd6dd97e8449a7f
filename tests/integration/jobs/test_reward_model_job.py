"""The reward-model job: from judgements to an artifact, again and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import json_format
from safetensors.torch import load_file
from tests.integration.jobs.conftest import Services, comparison
from tests.support.tiny import make_tiny_model

from honed.artifacts.draft import VersionDraft
from honed.artifacts.promotions import Promoted, PromotionRecord, PromotionState
from honed.artifacts.reward_models import RewardModelStore
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition
from honed.kit.progress import JobProgress, ProgressFile, read_progress
from honed.learner.jobs import reward_model
from honed.learner.jobs.home import job_home
from honed.learner.jobs.reuse import reused_models
from honed.learner.supervised.fit import Checkpoints
from honed.v1 import preference_pb2
from honed.workspace import Workspace

GOOD = ("a lovely film", "what a joy", "warm and kind", "a fine story")
BAD = ("a dull mess", "so long and flat", "cold noise", "it drags on")


class Rig:
    """A run with a base model, prompts and held-out judgements."""

    def __init__(self, root: Path, services: Services) -> None:
        self.root, self.services = root, services
        self.tree: dict[str, Any] = {}
        self.prompts = [[60 + i, 70 + i] for i in range(8)]
        (root / "prompts.jsonl").write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in self.prompts))
        held_out = [comparison(GOOD[3], BAD[3]), comparison(GOOD[0], BAD[3]), self.tie(), self.ranking()]
        lines = [{"judgement": json_format.MessageToDict(row, preserving_proto_field_name=True)} for row in held_out]
        (root / "held-out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.store = RewardModelStore(root / "run" / "policy", "small", "trained")
        policies = PolicyStore(root / "run" / "policy", "small")
        policies.publish(make_tiny_model(root / "model", seed=1), VersionDraft(VersionId(0, 0), ()))
        for good in GOOD[:3]:
            for bad in BAD[:3]:
                services.preference.compare(good, bad)

    @staticmethod
    def tie() -> preference_pb2.Judgement:
        judgement = comparison("as good", "as bad")
        judgement.pairwise.tie = True
        return judgement

    @staticmethod
    def ranking() -> preference_pb2.Judgement:
        """Three pairs, less the tie between the last two."""
        judgement = comparison(GOOD[1], BAD[1])
        judgement.responses.add(text=BAD[2])
        judgement.ranking.ranks.extend([1, 0, 1])
        return judgement

    def settings(self, **changes: Any) -> RunSettings:
        tree: dict[str, Any] = {
            "run": "small",
            "directory": str(self.root / "run"),
            "seed": 3,
            "security": {"authentication": False},
            "preference": {"port": self.services.port},
            "generation": {"port": self.services.port, "max_model_tokens": 128, "max_prompt_tokens": 32, "max_tokens": 96},
            "reward": {"scorers": [{"name": "people", "kind": "reward_model", "source": "trained", "sees_prompt": False}]},
            "reward_training": {"learning_rate": 3e-3, "normalising_samples": 6, "layers": 1},
            "conductor": {"response_tokens": 5, "fixed_length": True, "temperature": 0.7, "start_timeout_s": 30},
            "data": {
                "prompts": str(self.root / "prompts.jsonl"),
                "evaluation": {"judgements": {"file": str(self.root / "held-out.jsonl")}},
            },
        }
        tree |= self.tree
        for name, section in changes.items():
            tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
        return RunSettings.model_validate(tree)

    async def run(self, **changes: Any) -> list[str]:
        """Runs the job; the versions that stand after it."""
        await reward_model.run(self.settings(**changes))
        return [version.label for version in self.store.versions()]

    @property
    def figures(self) -> dict[str, float]:
        progress = read_progress(self.root / "run" / "progress" / "reward-model.json")
        assert progress is not None
        assert progress.done == 1.0
        return progress.figures


@pytest.fixture
def rig(tmp_path: Path, services: Services) -> Rig:
    return Rig(tmp_path, services)


async def test_the_job_publishes_a_reward_model_with_what_made_it_and_how_good_it_is(rig: Rig, tmp_path: Path) -> None:
    rig.services.generation.loading = 3
    assert await rig.run() == ["0.1"]
    manifest = rig.store.manifest(VersionId(0, 1))
    lineage = manifest.lineage
    assert (lineage.parent, len(lineage.preference_snapshot), len(lineage.reward_model_version)) == ("0.0", 64, 64)
    assert lineage.figures["judgements"] == 9
    assert lineage.figures["held_out"] == 4, "two comparisons and two pairs of the ranking; ties order nothing"
    assert 0.0 <= lineage.figures["agreement"] <= 1.0
    assert rig.figures == lineage.figures
    asked = rig.services.generation.asked
    assert [list(request.prompt.token_ids.ids) for request in sorted(asked, key=lambda r: r.sampling.seed)] == rig.prompts[:6]
    assert {(r.n, r.sampling.max_tokens, round(r.sampling.temperature, 3), r.sampling.fixed_length) for r in asked} == {
        (1, 5, 0.7, True)
    }
    config = json.loads((rig.store.fetch(VersionId(0, 1), tmp_path / "copy") / "config.json").read_text())
    assert "reward_bias" in config
    assert sorted(path.name for path in (tmp_path / "run" / "jobs" / "reward-model").iterdir()) == ["0.0", "unfinished"]


async def test_the_trained_model_prefers_what_people_preferred(rig: Rig) -> None:
    for _ in range(10):
        for good in GOOD:
            for bad in BAD:
                rig.services.preference.compare(good, bad)
    await rig.run(reward_training={"learning_rate": 1e-3, "normalising_samples": 6, "layers": 1, "batch_texts": 2})
    assert rig.figures["agreement"] == 1.0


async def test_judgements_that_no_reward_model_could_read_are_counted(rig: Rig) -> None:
    rig.services.preference.compare("", BAD[0])
    assert await rig.run() == ["0.1"]
    assert (rig.figures["judgements"], rig.figures["left_out"]) == (9, 1)


async def test_weights_that_leave_nobody_are_an_error_that_names_them(rig: Rig) -> None:
    with pytest.raises(FailedPrecondition, match=r"reward_training\.annotator_weights"):
        await rig.run(reward_training={"annotator_weights": {"somebody": 0}})
    with pytest.raises(FailedPrecondition, match="annotator_weights, source_weights and"):
        await rig.run(reward_training={"source_weights": {"test": 0}})


async def test_the_head_alone_is_trained_on_the_body_of_another_model(rig: Rig, tmp_path: Path) -> None:
    body = make_tiny_model(tmp_path / "body", seed=2)
    section = {"start_from": str(body), "train": "head", "read": "mean", "read_layers": [1], "normalising_samples": 6}
    rig.tree["reward_training"] = section
    assert await rig.run() == ["0.1"]
    made = rig.store.fetch(VersionId(0, 1), tmp_path / "copy")
    config = json.loads((made / "config.json").read_text())
    assert (config["reward_read"], config["reward_layers"], config["num_hidden_layers"]) == ("mean", [1], 1)
    weights, own = load_file(made / "model.safetensors"), load_file(body / "model.safetensors")
    assert all(torch.equal(weights[name], own[name]) for name in weights.keys() & own.keys())
    assert rig.figures["agreement"] > 0.5
    assert await rig.run() == ["0.1"]
    edited = json.loads((body / "config.json").read_text()) | {"another": "model"}
    (body / "config.json").write_text(json.dumps(edited))
    assert await rig.run() == ["0.1", "0.2"], "another body makes another reward model"


async def test_adapters_are_trained_on_the_body_and_are_part_of_what_is_saved(rig: Rig, tmp_path: Path) -> None:
    rig.tree["reward_training"] = {"train": "adapters", "adapter_rank": 2, "learning_rate": 1e-2, "normalising_samples": 6}
    assert await rig.run() == ["0.1"]
    made = rig.store.fetch(VersionId(0, 1), tmp_path / "copy")
    weights, own = load_file(made / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    shared = weights.keys() & own.keys()
    assert shared == own.keys() - {"lm_head.weight"}, "no adapter is left in the file"
    moved = {name for name in shared if not torch.equal(weights[name], own[name])}
    assert moved == {name for name in shared if ".layers." in name and own[name].dim() == 2}
    ranks = {name: int(torch.linalg.matrix_rank(weights[name] - own[name], rtol=1e-3)) for name in moved}
    assert set(ranks.values()) <= {1, 2}
    assert await rig.run() == ["0.1"]


async def test_the_same_judgements_and_settings_train_nothing_again(rig: Rig) -> None:
    await rig.run()
    figures = rig.figures
    assert await rig.run() == ["0.1"]
    assert rig.services.preference.exported == 1
    assert rig.figures == figures
    assert await rig.run(reward_training={"learning_rate": 1e-3, "normalising_samples": 6, "layers": 1}) == ["0.1", "0.2"]


async def test_another_run_takes_the_model_that_was_trained_of_the_same(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = rig.settings().model_copy(update={"reuse": tmp_path / "reuse"})
    other = one.model_copy(update={"run": "other", "directory": tmp_path / "other"})
    store = RewardModelStore(other.policy_url, "other", "trained")
    PolicyStore(other.policy_url, "other").publish(tmp_path / "model", VersionDraft(VersionId(0, 0), ()))
    await reward_model.run(one)
    monkeypatch.setattr(reward_model, "reward_trainer", None)  # from here on nothing can be trained
    await reward_model.run(other)
    first, taken = rig.store.manifest(VersionId(0, 1)), store.manifest(VersionId(0, 1))
    assert taken.files == first.files
    assert taken.lineage.figures == first.lineage.figures
    assert taken.lineage.preference_snapshot == first.lineage.preference_snapshot
    assert list(reused_models(Workspace(other.directory))) == ["reward-model"]
    rig.services.preference.compare(GOOD[3], BAD[0])
    with pytest.raises(TypeError):
        await reward_model.run(other)  # of other judgements it would be another model


async def test_a_refresh_learns_from_what_people_have_said_since(rig: Rig) -> None:
    await rig.run()
    rig.services.preference.compare(GOOD[3], BAD[0])
    assert await rig.run() == ["0.1", "0.2"]
    first, second = (rig.store.manifest(VersionId(0, step)).lineage for step in (1, 2))
    assert first.preference_snapshot != second.preference_snapshot
    assert (first.figures["judgements"], second.figures["judgements"]) == (9, 10)


async def test_old_versions_go_and_the_promoted_one_stays(rig: Rig) -> None:
    await rig.run(policy={"keep": 1})
    record = PromotionRecord(rig.root / "run" / "policy", "small")
    record.write(PromotionState().with_promotion("people", Promoted("artifact:trained/0.1", "digest", "trained")))
    for bad in BAD[:2]:
        rig.services.preference.compare(GOOD[3], bad)
        versions = await rig.run(policy={"keep": 1})
    assert versions == ["0.1", "0.3"]


async def test_what_the_run_file_names_stays_too_and_another_seed_makes_another_member(rig: Rig) -> None:
    members = {"members": ["artifact:trained/0.1", "artifact:trained/0.2"], "combine": "minimum"}
    reward = {"scorers": [{"name": "people", "kind": "ensemble", "options": members}]}
    for seed in (3, 4, 5, 6):
        versions = await rig.run(policy={"keep": 1}, seed=seed, reward=reward)
    assert versions == ["0.1", "0.2", "0.4"]


@pytest.mark.parametrize("why", ["trained on", "away", "no target"])
async def test_the_reference_is_sampled_here_where_nobody_serves_it(rig: Rig, why: str) -> None:
    changes: dict[str, Any] = {}
    if why == "trained on":
        rig.services.generation.version.step = 7
    elif why == "away":
        changes = {
            "generation": {**rig.settings().generation.model_dump(), "port": 1},
            "conductor": {**rig.settings().conductor.model_dump(), "start_timeout_s": 0.2},
        }
    else:
        changes = {"generation": {**rig.settings().generation.model_dump(), "port": 0}}
    assert await rig.run(**changes) == ["0.1"]
    assert rig.services.generation.asked == []


async def test_prompts_are_read_as_the_run_reads_them(rig: Rig) -> None:
    rows: list[Any] = [{"text": "ab", "messages": None}, {"token_ids": [5, 6], "text": None}]
    (rig.root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    await rig.run()
    asked = sorted(rig.services.generation.asked, key=lambda request: request.sampling.seed)
    assert [len(request.prompt.token_ids.ids) for request in asked] == [2, 2]
    rows.append({"text": "x" * 200})
    (rig.root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rig.services.preference.compare(GOOD[3], BAD[0])
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 3: text: has 200 tokens"):
        await rig.run()


async def test_a_run_without_judgements_says_what_to_do(rig: Rig) -> None:
    rig.services.preference.judgements = [rig.tie()]
    with pytest.raises(FailedPrecondition, match=r"data\.judgements"):
        await rig.run()
    assert rig.store.versions() == []


class Killed(BaseException):
    """Ends a job in its middle."""


def kill_at(doing: str, patch: pytest.MonkeyPatch, module: Any) -> None:
    """Has the job save after each step, and end when its progress is to say that; empty for an end at no point."""
    patch.setattr(module, "Checkpoints", lambda directory: Checkpoints(directory, every_s=0, clock=lambda: 0.0))
    report = ProgressFile.report

    def watched(self: ProgressFile, progress: JobProgress, *, final: bool = False) -> None:
        if doing and progress.doing.split(" of ")[0] == doing:
            raise Killed
        report(self, progress, final=final)

    patch.setattr(ProgressFile, "report", watched)


async def test_a_job_that_was_killed_goes_on_with_the_judgements_of_then(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"reward_training": {"batch_texts": 2}}
    with monkeypatch.context() as patch:
        kill_at("step 4", patch, reward_model)
        with pytest.raises(Killed):
            await rig.run(**few)
        assert not rig.store.versions()
    [then] = rig.services.preference.snapshots.values()
    rig.services.preference.compare("new since then", BAD[0])
    with monkeypatch.context() as patch:
        kill_at("", patch, reward_model)
        assert await rig.run(**few) == ["0.1"]
    manifest = rig.store.manifest(VersionId(0, 1))
    assert manifest.lineage.figures["judgements"] == len(then) == 9
    assert [path.name for path in Workspace(rig.root / "run").unfinished("reward-model").iterdir()] == ["lock"]

    (rig.root / "other").mkdir()
    other = Rig(rig.root / "other", rig.services)  # the same run, whose job nobody killed
    rig.services.preference.judgements = list(then)
    assert await other.run(**few) == ["0.1"]
    assert other.store.manifest(VersionId(0, 1)).lineage.reward_model_version == manifest.lineage.reward_model_version

    assert await rig.run(**few) == ["0.1"], "the judgements of now are those of the newest version"
    rig.services.preference.compare("newer", BAD[0])
    assert await rig.run(**few) == ["0.1", "0.2"]


async def test_judgements_that_are_erased_while_a_job_lies_killed_are_not_trained_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"reward_training": {"batch_texts": 2}}
    with monkeypatch.context() as patch:
        kill_at("step 4", patch, reward_model)
        with pytest.raises(Killed):
            await rig.run(**few)
    [then] = rig.services.preference.snapshots.values()
    del then[0]
    with monkeypatch.context() as patch:
        kill_at("step 1", patch, reward_model)
        with pytest.raises(Killed):  # it begins at its first step again
            await rig.run(**few)


async def test_the_same_job_twice_at_once_is_refused(rig: Rig, tmp_path: Path) -> None:
    place = Workspace(tmp_path / "run").unfinished("reward-model")
    with job_home(place, {}), pytest.raises(FailedPrecondition, match="at work already"):
        await rig.run()
