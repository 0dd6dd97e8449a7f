"""Models that later runs take: of the same alone, whole, and with the run that trained them."""

import json

import pytest

from honed.check.run import check_run
from honed.config import RunSettings
from honed.learner.jobs import pretrain
from honed.learner.jobs.reuse import Shelf, reused_models
from honed.workspace import Workspace

MADE_OF = {"seed": 1, "texts": ["ab"]}


def settings(root, run="one", **more):
    return RunSettings.model_validate({"run": run, "directory": str(root / run), "reuse": str(root / "reuse"), **more})


def model(directory, text="weights"):
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_text(text)
    (directory / "config.json").write_text("{}")
    return directory


def shelf(root, run="one", made_of=MADE_OF, kind="pretrain"):
    chosen = settings(root, run)
    chosen.directory.mkdir(exist_ok=True)
    return Shelf(chosen, kind, made_of)


def test_a_model_is_taken_by_another_run_that_would_make_it_of_the_same(tmp_path):
    shelf(tmp_path).keep(model(tmp_path / "made"), {"agreement": 0.75})
    taken = tmp_path / "two" / "model"
    reused = shelf(tmp_path, "two").take(taken)
    assert (reused.run, reused.figures) == ("one", {"agreement": 0.75})
    assert {path.name: path.read_text() for path in taken.iterdir()} == {"model.safetensors": "weights", "config.json": "{}"}
    assert list(reused_models(Workspace(tmp_path / "two"))) == ["pretrain"]
    assert reused_models(Workspace(tmp_path / "one")) == {}
    [entry] = (tmp_path / "reuse").iterdir()
    record = json.loads((entry / "made_of.json").read_text())
    assert record["run"] == "one"
    assert MADE_OF.items() <= record["made_of"].items()


@pytest.mark.parametrize("other", [{"made_of": {**MADE_OF, "seed": 2}}, {"kind": "reward-model"}])
def test_what_is_made_of_something_else_is_not_taken(other, tmp_path):
    shelf(tmp_path).keep(model(tmp_path / "made"))
    assert shelf(tmp_path, "two", **other).take(tmp_path / "taken") is None
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "model.safetensors").write_text("others"),
        lambda entry: (entry / "model.safetensors").unlink(),
        lambda entry: (entry / "more.safetensors").write_text("weights"),
        lambda entry: (entry / "made_of.json").write_text("{"),
        lambda entry: (entry / "made_of.json").write_text("{}"),
    ],
)
def test_an_entry_that_is_damaged_is_not_taken_and_the_next_one_takes_its_place(damage, tmp_path):
    shelf(tmp_path).keep(model(tmp_path / "made"))
    [entry] = (tmp_path / "reuse").iterdir()
    damage(entry)
    again = shelf(tmp_path, "two")
    assert again.take(tmp_path / "taken") is None
    assert not (tmp_path / "taken").exists()
    again.keep(model(tmp_path / "made again"))
    assert shelf(tmp_path, "three").take(tmp_path / "taken").run == "two"


def test_a_directory_that_cannot_be_written_costs_no_run_its_model(tmp_path):
    (tmp_path / "reuse").write_text("a file")
    shelf(tmp_path).keep(model(tmp_path / "made"))
    assert shelf(tmp_path, "two").take(tmp_path / "taken") is None


def test_the_check_warns_of_a_directory_that_cannot_be_made(tmp_path):
    def found(path):
        run = settings(tmp_path, reuse=str(path))
        return [finding.text for finding in check_run(run, fast=True).findings if finding.where == "reuse"]

    (tmp_path / "file").write_text("")
    assert found(tmp_path / "new" / "one") == []
    assert "every model is trained, and none is kept" in found(tmp_path / "file" / "below")[0]


def test_nothing_is_kept_where_no_directory_is_named(tmp_path):
    plain = RunSettings.model_validate({"directory": str(tmp_path)})
    Shelf(plain, "pretrain", MADE_OF).keep(model(tmp_path / "made"))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_the_second_run_of_a_pretraining_trains_nothing(tmp_path, monkeypatch):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "one fish two fish"}\n' * 20)
    small = {
        "data": {"texts": [str(texts)]},
        "pretrain": {"tokens": 200, "vocabulary": 300, "hidden_size": 32, "layers": 1, "block_tokens": 16, "block_rows": 2},
        "generation": {"max_model_tokens": 32, "max_prompt_tokens": 16, "max_tokens": 8, "default_max_tokens": 8},
        "conductor": {"response_tokens": 8},
    }
    one, two = settings(tmp_path, "one", **small), settings(tmp_path, "two", **small)
    pretrain.run(one)
    monkeypatch.setattr(pretrain, "new_language_model", None)  # nothing may be trained any more
    pretrain.run(two)
    bases = [Workspace(run.directory).base_model for run in (one, two)]
    assert len({(base / "model.safetensors").read_bytes() for base in bases}) == 1
    assert reused_models(Workspace(two.directory))["pretrain"] > 0
    progress = json.loads((Workspace(two.directory).progress / "pretrain.json").read_text())
    assert progress["done"] == 1.0
    other = settings(tmp_path, "three", seed=2, **small)
    with pytest.raises(TypeError):  # another seed is something else
        pretrain.run(other)
