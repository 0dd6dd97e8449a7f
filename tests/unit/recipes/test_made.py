"""Data that honed makes: named in a run file, found by that name, made once, and refused where it cannot be."""

import itertools
import json

import pytest
import yaml
from google.protobuf import json_format
from tests.unit.demo.conftest import movies

from honed.check.run import check_run
from honed.config import RunSettings
from honed.demo import material
from honed.demo.data.ratings import MOVIES, RatedText
from honed.demo.data.split import split
from honed.kit.errors import FailedPrecondition
from honed.learner.data.judged import read_judgement
from honed.recipes.made import base
from honed.recipes.made.base import Sampled, awaited_files, find_made, made_names, make_data
from honed.recipes.made.rankings import FEWEST, MOST, demonstrations, rankings
from honed.settings_file import SettingsError, load_settings
from honed.v1 import preference_pb2

SCORED = {"reward": {"scorers": [{"name": "words", "kind": "function", "source": "length"}]}}


def settings(tmp_path, **data):
    return RunSettings.model_validate({"directory": str(tmp_path / "run"), "data": data, **SCORED})


@pytest.fixture
def few_ratings(monkeypatch):
    """A split of made-up ratings in place of the fetched ones."""
    texts = tuple(
        RatedText(MOVIES, item.id, " ".join([item.text, "and many more words of it all", "x" * (number % 3)]), item.ratings)
        for number, item in enumerate(movies(90))
    )
    parts = split({MOVIES: texts}, seed=1, held_out=20, judge=20)
    monkeypatch.setattr(material, "rating_split", lambda seed: parts)
    monkeypatch.setattr(material, "COMPARISONS", 50)
    monkeypatch.setattr(material, "HELD_OUT_COMPARISONS", 50)
    return parts


@pytest.mark.parametrize("name", made_names())
def test_each_entry_writes_the_files_that_it_names_and_nothing_is_wrong_with_them(name, tmp_path, few_ratings):
    run = settings(tmp_path, made=name)
    assert awaited_files(run)
    make_data(run)
    assert awaited_files(run) == set()
    wrong = [finding for finding in check_run(run, fast=True).errors if finding.where.startswith("data")]
    assert wrong == []
    assert find_made(name).title
    assert not {source.source for source in run.data.judgements} - {*find_made(name).sources}


def test_a_run_file_may_name_some_files_itself(tmp_path):
    own = tmp_path / "own.jsonl"
    run = settings(tmp_path, made="sums", prompts=str(own), evaluation={"samples": 3})
    assert run.data.prompts == own
    assert run.data.texts == (tmp_path / "run" / "data" / "texts.jsonl",)
    assert run.data.evaluation.prompts == tmp_path / "run" / "data" / "evaluation.jsonl"
    assert run.data.evaluation.samples == 3
    assert RunSettings.model_validate(run.model_dump(mode="json")) == run  # as the processes of a run read it
    assert RunSettings.model_validate({**dict(run), "data": run.data.model_copy()}) == run
    errors = [finding for finding in check_run(run, fast=True).errors if finding.where.startswith("data")]
    assert [error.where for error in errors] == ["data.prompts"]  # what the run does not make must be there


def test_data_that_is_not_there_is_refused_with_what_there_is(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"data": {"made": "hanoi"}}))
    with pytest.raises(SettingsError, match=r"data\.made: there is no 'hanoi'; there are continuations, openings, rankings, "):
        load_settings(path, {})


@pytest.mark.parametrize("launcher", ["none", "kubernetes"])
def test_data_is_not_made_where_services_run_elsewhere(launcher, tmp_path):
    with pytest.raises(ValueError, match=r"data\.made: sums is made .*`honed data prepare sums --to DIRECTORY`"):
        RunSettings.model_validate({"data": {"made": "sums"}, "conductor": {"launcher": launcher}})


def test_data_is_made_again_for_the_same_seed_alone(tmp_path):
    run = settings(tmp_path, made="walks")
    make_data(run)
    make_data(run)
    with pytest.raises(FailedPrecondition, match="holds walks of seed 1, and the run wants walks of seed 2"):
        make_data(run.model_copy(update={"seed": 2}))
    with pytest.raises(FailedPrecondition, match="holds walks of seed 1, and the run wants sums of seed 1"):
        make_data(settings(tmp_path, made="sums"))


def test_data_whose_making_was_cut_short_is_not_mixed_with_that_of_another_seed(tmp_path, monkeypatch):
    def cut_short(directory, seed):
        raise KeyboardInterrupt

    run = settings(tmp_path, made="walks")
    with monkeypatch.context() as patch:
        patch.setattr(find_made("walks"), "write", cut_short)
        with pytest.raises(KeyboardInterrupt):
            make_data(run)
    with pytest.raises(FailedPrecondition, match="of seed 1, and the run wants walks of seed 2"):
        make_data(run.model_copy(update={"seed": 2}))
    make_data(run)
    assert awaited_files(run) == set()


def test_nothing_is_made_where_the_run_file_names_its_files(tmp_path):
    make_data(settings(tmp_path))
    assert not (tmp_path / "run").exists()


def test_what_a_continuation_is_compared_with_is_what_its_author_wrote(tmp_path, few_ratings):
    data = find_made("continuations")
    data.write(tmp_path, seed=1)
    written = {item.text for item in few_ratings.judge}
    rows = [json.loads(line) for line in data.files(tmp_path).prompts.read_text().splitlines()]
    assert rows
    assert {f"{row['text']} {row['reference']}" for row in rows} <= {" ".join(text.split()) for text in written}
    assert all(4 <= len(row["text"].split()) <= 8 for row in rows)


def test_openings_have_two_to_eight_words(tmp_path, few_ratings):
    data = find_made("openings")
    data.write(tmp_path, seed=1)
    lengths = {len(json.loads(line)["text"].split()) for line in data.files(tmp_path).prompts.read_text().splitlines()}
    assert (min(lengths), max(lengths)) == (2, 8)


def test_demonstrations_are_of_the_best_rated_texts():
    rated = movies(40)
    rows = list(demonstrations(rated, seed=1, count=10))
    rating = {item.text: item.mean_rating for item in rated}
    worst = sorted(rating.values(), reverse=True)[9]
    assert rows
    assert all(rating[f"{row['text']} {row['response']}"] >= worst for row in rows)
    assert all(row["response"] for row in rows)


def test_rankings_order_texts_by_one_rating_of_each_and_have_no_ties():
    rated = {item.text: item for item in movies(60)}
    lines = list(rankings(list(rated.values()), seed=1, count=60))
    assert len({line["idempotency_key"] for line in lines}) == 60
    sizes = set()
    for row in (line["judgement"] for line in lines):
        judgement = json_format.ParseDict(row, preference_pb2.Judgement())
        judged = read_judgement(judgement)
        assert judged is not None, "the reward model learns from each"
        assert len({*judged.responses}) == len(judged.responses)
        for better, worse in itertools.pairwise(judged.responses):  # a better one has a rating over one of the worse one's
            assert max(rated[better].ratings) > min(rated[worse].ratings)
        sizes.add(len(judged.responses))
    assert FEWEST <= min(sizes) < max(sizes) <= MOST
    assert lines == list(rankings(list(rated.values()), seed=1, count=60))


def test_a_figure_of_rewards_needs_a_scorer():
    with pytest.raises(FailedPrecondition, match="name a scorer"):
        Sampled([], [], [], [1.0]).mean_rewards()
    assert Sampled([], [], [1.0, 2.0], [3.0]).mean_rewards() == (1.5, 3.0)


def test_names_are_those_of_the_files():
    assert "base" not in made_names()
    assert base.find_made("sums") is find_made("sums")
