"""Claims about the run's sequence of prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.tiny import make_tokenizer

from honed.conductor.prompts import PromptSequence, check_prompts
from honed.config import ConductorSettings
from honed.v1 import common_pb2

PROMPTS = [[number, number + 1] for number in range(10)]


def sequence(seed: int = 1, prompts: list[list[int]] = PROMPTS, **settings: int) -> PromptSequence:
    return PromptSequence("r", prompts, seed, ConductorSettings(**settings))


def tasks(sequence: PromptSequence, first: int, count: int) -> list[common_pb2.PromptTask]:
    return [common_pb2.PromptTask.FromString(message.body) for message in sequence.messages(first, count)]


def test_a_turn_is_the_same_prompt_with_the_same_seed_wherever_one_begins() -> None:
    whole = tasks(sequence(), 0, 35)
    assert tasks(sequence(), 17, 5) == whole[17:22]
    assert [task.group_id for task in whole] == [f"r-{turn}" for turn in range(35)]


def test_each_pass_holds_every_prompt_once_in_another_order() -> None:
    passes = [[list(t.prompt_token_ids) for t in tasks(sequence(), 10 * epoch, 10)] for epoch in range(3)]
    assert all(sorted(each) == PROMPTS for each in passes)
    assert passes[0] != passes[1] != passes[2]


def test_seeds_differ_between_turns_and_between_runs() -> None:
    seeds = [task.sampling.seed for task in tasks(sequence(), 0, 1000)]
    assert len(set(seeds)) == 1000
    assert seeds != [task.sampling.seed for task in tasks(sequence(seed=2), 0, 1000)]
    assert max(seeds) + 256 < 1 << 62, "each sample of a prompt adds to the seed"


def test_sampling_is_what_the_settings_say() -> None:
    task = tasks(sequence(samples_per_prompt=3, response_tokens=11), 0, 1)[0]
    assert (task.samples, task.sampling.max_tokens, task.sampling.temperature, task.run) == (3, 11, 1.0, "r")


def test_text_is_tokenised_and_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"text": "ab"}) + "\n\n" + json.dumps({"token_ids": [7, 8, 9]}) + "\n")
    loaded = PromptSequence.load("r", path, tmp_path, 0, ConductorSettings(), longest=9)
    lengths = sorted(len(task.prompt_token_ids) for task in tasks(loaded, 0, 2))
    assert lengths == [2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "there are no prompts"),
        ('{"text": "a"}\n{"text": "b', "line 2: not JSON"),
        ('{"prompt": "a"}\n', "line 1: needs `text` or `token_ids`"),
        ("[1, 2]\n", "line 1: must be a JSON object"),
        ('{"token_ids": ["a"]}\n', "line 1"),
        ('{"token_ids": [1.5]}\n', "line 1"),
        ('{"token_ids": []}\n', "line 1"),
        ('{"token_ids": [-3]}\n', "line 1"),
        ('{"token_ids": [258]}\n', "each from 0 to 257"),
        ('{"text": ""}\n', "line 1"),
        ('{"text": "a"}\n{"text": "ten letters"}\n', "line 2: has 11 tokens; .* leave room for 9"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: str | None, message: str) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        PromptSequence.load("r", path, tmp_path, 0, ConductorSettings(), longest=9)
    assert "prompts" in str(raised.value)


@pytest.mark.parametrize("content", [None, "", "\n", '{"text": "a"}\n{"te', '{"prompt": "a"}\n'])
def test_what_is_wrong_without_a_tokenizer_is_found_before_any_work(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"prompts\.jsonl"):
        check_prompts(path)
