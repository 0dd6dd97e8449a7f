"""The pretraining job is killed and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.jobs.test_reward_model_job import Killed, kill_at
from tests.support.tiny import make_tiny_model

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.kit.errors import InvalidArgument
from honed.learner.jobs import fine_tuning, pretrain
from honed.models.loader import load_language_model
from honed.models.tokenizer import load_tokenizer
from honed.workspace import Workspace

TEXTS = [f"{a} {b} film about {c}." for a in ("A lovely", "The dull") for b in ("quiet", "long") for c in ("love", "war", "it")]


def settings_of(root: Path, **section: Any) -> RunSettings:
    root.mkdir(exist_ok=True)
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    sizes = {"vocabulary": 300, "hidden_size": 32, "layers": 1, "block_tokens": 16, "block_rows": 2, "tokens": 1000}
    tree = {
        "run": "small",
        "directory": str(root / "run"),
        "generation": {"max_model_tokens": 64, "max_prompt_tokens": 32, "max_tokens": 16},
        "conductor": {"response_tokens": 8},
        "pretrain": {**sizes, "threads": 1, **section},
        "data": {"texts": [str(root / "texts.jsonl")]},
    }
    return RunSettings.model_validate(tree)


def published(settings: RunSettings) -> dict[str, str]:
    manifest = PolicyStore(settings.policy_url, settings.run).manifest(VersionId(0, 0))
    return {entry.path: entry.sha256 for entry in manifest.files}


def test_a_killed_job_goes_on_and_publishes_what_one_that_was_not_killed_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = settings_of(tmp_path / "whole")
    pretrain.run(whole)
    killed = settings_of(tmp_path / "killed")
    with monkeypatch.context() as patch:
        kill_at("step 12", patch, pretrain)
        with pytest.raises(Killed):
            pretrain.run(killed)
    home = Workspace(killed.directory).unfinished("pretrain")
    assert [path.name for path in (home / "checkpoints").iterdir()] == ["000000-00000011-step-11"]
    with monkeypatch.context() as patch:
        kill_at("step 5", patch, pretrain)  # it does not come by there again
        pretrain.run(killed)
    assert published(killed) == published(whole)
    assert [path.name for path in home.iterdir()] == ["lock"]


def test_other_settings_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at("step 12", patch, pretrain)
        with pytest.raises(Killed):
            pretrain.run(settings_of(tmp_path))
    other = settings_of(tmp_path, learning_rate=2e-3)
    with monkeypatch.context() as patch:
        kill_at("step 1", patch, pretrain)
        with pytest.raises(Killed):
            pretrain.run(other)


def test_too_few_texts_for_a_batch_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="use a smaller batch"):
        pretrain.run(settings_of(tmp_path, block_rows=64))


def lineage(settings: RunSettings) -> str:
    pretrain.run(settings)
    return PolicyStore(settings.policy_url, settings.run).manifest(VersionId(0, 0)).lineage.config_hash


def test_the_lineage_of_the_base_says_what_it_was_made_of_and_not_what_learns_later(tmp_path: Path) -> None:
    first = lineage(settings_of(tmp_path / "first"))
    later = settings_of(tmp_path / "later").model_dump(mode="json")
    later["learner"]["batch"] *= 2
    later["learner"]["learning_rate"] *= 2
    assert lineage(RunSettings.model_validate(later)) == first
    other = settings_of(tmp_path / "other")
    [texts] = other.data.texts
    with texts.open("a") as file:
        file.write(json.dumps({"text": "One more film."}) + "\n")
    assert lineage(other) != first
    assert lineage(settings_of(tmp_path / "longer", tokens=1100)) != first


def started_from(root: Path, *, seed: int) -> RunSettings:
    tree = settings_of(root).model_dump(mode="json")
    make_tiny_model(root / "model", seed=seed)
    tree["conductor"]["start_from"] = str(root / "model")
    return RunSettings.model_validate(tree)


def test_the_lineage_of_a_base_that_was_not_trained_here_is_that_of_its_weights(tmp_path: Path) -> None:
    ours, same, other = (started_from(tmp_path / str(n), seed=seed) for n, seed in enumerate((2, 2, 3)))
    assert lineage(ours) == lineage(same) != lineage(other)


def test_a_base_of_a_release_that_kept_no_record_is_known_by_its_weights(tmp_path: Path) -> None:
    ours, older = started_from(tmp_path / "ours", seed=2), started_from(tmp_path / "older", seed=2)
    place = Workspace(older.directory)
    make_tiny_model(place.base_model, seed=2)
    assert lineage(older) == lineage(ours)


def test_the_lineage_of_a_fine_tuned_base_has_its_demonstrations_and_the_model_before_them(tmp_path: Path) -> None:
    ours, same, longer, other = (tuned(tmp_path / str(n), epochs=epochs) for n, epochs in enumerate((2, 2, 3, 2)))
    make_tiny_model(Path(str(other.conductor.start_from)), seed=3)
    assert lineage(ours) == lineage(same)
    assert len({lineage(ours), lineage(longer), lineage(other)}) == 3


ANSWERS = [("is it good?", "yes"), ("is it bad?", "no")]


def tuned(root: Path, **section: Any) -> RunSettings:
    """A run that begins with a model which it fine-tunes on a few answers."""
    settings = settings_of(root)
    make_tiny_model(root / "model", seed=2)
    rows = [{"text": prompt, "response": response} for prompt, response in ANSWERS]
    (root / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = settings.model_dump(mode="json")
    tree["conductor"]["start_from"] = str(root / "model")
    tree["data"] = {"demonstrations": [str(root / "answers.jsonl")]}
    tree["sft"] = {"epochs": 60, "batch": 2, "learning_rate": 3e-3, "threads": 1, **section}
    return RunSettings.model_validate(tree)


def test_a_run_begins_with_what_demonstrations_have_taught(tmp_path: Path) -> None:
    settings = tuned(tmp_path)
    pretrain.run(settings)
    base = PolicyStore(settings.policy_url, settings.run).fetch(VersionId(0, 0), tmp_path / "fetched")
    model, tokenizer = load_language_model(base), load_tokenizer(base)
    for prompt, response in ANSWERS:
        tokens = torch.tensor([tokenizer.encode(prompt, special_tokens=True)])
        answered = model.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :].tolist()
        assert tokenizer.decode(answered).strip() == response
        assert answered[-1] == tokenizer.end
    assert (base / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()


def test_fine_tuning_that_is_killed_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tuned(tmp_path / "whole", epochs=12), tuned(tmp_path / "killed", epochs=12)
    pretrain.run(whole)
    with monkeypatch.context() as patch:
        kill_at("fine-tuning: step 8", patch, fine_tuning)
        with pytest.raises(Killed):
            pretrain.run(killed)
    with monkeypatch.context() as patch:
        kill_at("fine-tuning: step 3", patch, fine_tuning)  # it does not come by there again
        pretrain.run(killed)
    assert published(killed) == published(whole)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, "line 3: response: must be a string that is not empty"),
        ({"response": "a"}, "line 3: needs `text`, `token_ids` or `messages`"),
        ({"text": "a" * 500, "response": "b"}, "line 3: text: has "),
    ],
)
def test_a_demonstration_that_cannot_be_used_is_named(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    settings = tuned(tmp_path)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"answers\.jsonl, {reason}"):
        pretrain.run(settings)
