"""Claims about the prompts of a run: the file, its order, and the mixture."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.support.tiny import make_tokenizer

from honed.conductor.prompt_file import FilePrompt, PromptFile, check_prompts, permuted
from honed.conductor.prompts import PromptMix
from honed.conductor.settings import ConductorSettings, PromptMixSettings
from honed.kit.errors import InvalidArgument
from honed.models.prompts import PromptEncoder, read_tokenizer
from honed.queue.inbox import WaitingPrompt
from honed.queue.keys import APPLICATION, SUBMITTED
from honed.v1 import common_pb2, generation_pb2

PROMPTS = [[number, number + 1] for number in range(10)]


@pytest.fixture
def encoder(tmp_path: Path) -> PromptEncoder:
    make_tokenizer(tmp_path)
    return PromptEncoder.of_model(tmp_path, longest=9)


@pytest.fixture
def file(tmp_path: Path, encoder: PromptEncoder) -> Iterator[PromptFile]:
    with PromptFile(write(tmp_path, *({"token_ids": prompt} for prompt in PROMPTS)), encoder) as file:
        yield file


def write(directory: Path, *rows: object) -> Path:
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mix(
    file: PromptFile | None, encoder: PromptEncoder, seed: int = 1, weights: dict[str, float] | None = None, **settings: int
):
    return PromptMix("r", file, encoder, seed, ConductorSettings(prompt_mix=PromptMixSettings(**(weights or {})), **settings))


def tasks(of: PromptMix, first: int, count: int, file: int | None = None) -> list[common_pb2.PromptTask]:
    plan = of.plan(first, count, first if file is None else file, {})
    return [common_pb2.PromptTask.FromString(message.body) for message in plan.messages]


def waiting(count: int, first: int = 0, letter: str = "x") -> list[WaitingPrompt]:
    return [WaitingPrompt(f"{number}-0", generation_pb2.Prompt(text=f"{letter}{number}")) for number in range(first, count)]


def ids(of: Sequence[common_pb2.PromptTask]) -> list[list[int]]:
    return [list(task.prompt_token_ids) for task in of]


def test_a_turn_is_the_same_prompt_with_the_same_seed_wherever_one_begins(file, encoder) -> None:
    whole = tasks(mix(file, encoder), 0, 35)
    assert tasks(mix(file, encoder), 17, 5) == whole[17:22]
    assert [task.group_id for task in whole] == [f"r-{turn}" for turn in range(35)]
    assert {task.source for task in whole} == {"file"}


def test_each_pass_holds_every_prompt_once_in_another_order(file, encoder) -> None:
    passes = [ids(tasks(mix(file, encoder), 10 * epoch, 10)) for epoch in range(3)]
    assert all(sorted(each) == PROMPTS for each in passes)
    assert passes[0] != passes[1] != passes[2]
    assert ids(tasks(mix(file, encoder, seed=2), 0, 10)) != passes[0]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_the_order_of_a_pass_is_a_permutation(size: int) -> None:
    order = [permuted(place, size, "1/epoch/0") for place in range(size)]
    assert sorted(order) == list(range(size))
    if size >= 1000:
        near = sum(abs(one - two) < size / 20 for one, two in itertools.pairwise(order))
        assert near < size / 5, "neighbours are spread"


def test_seeds_differ_between_turns_and_between_runs(file, encoder) -> None:
    seeds = [task.sampling.seed for task in tasks(mix(file, encoder), 0, 1000)]
    assert len(set(seeds)) == 1000
    assert seeds != [task.sampling.seed for task in tasks(mix(file, encoder, seed=2), 0, 1000)]
    assert max(seeds) + 256 < 1 << 62, "each sample of a prompt adds to the seed"


def test_sampling_is_what_the_settings_say(file, encoder) -> None:
    task = tasks(mix(file, encoder, samples_per_prompt=3, response_tokens=11), 0, 1)[0]
    assert (task.samples, task.sampling.max_tokens, task.sampling.temperature, task.run) == (3, 11, 1.0, "r")


@pytest.mark.parametrize(("weights", "share"), [({}, 0.5), ({"submitted": 3.0}, 0.75), ({"file": 0.0}, 1.0)])
def test_sources_are_drawn_by_weight_evenly_over_any_stretch(file, encoder, weights, share) -> None:
    plan = mix(file, encoder, weights={"application": 0.0, **weights}).plan(0, 400, 0, {SUBMITTED: waiting(400)})
    sources = [common_pb2.PromptTask.FromString(message.body).source for message in plan.messages]
    for start in range(0, 400, 50):
        assert Counter(sources[start : start + 50])[SUBMITTED] == pytest.approx(50 * share, abs=3)
    assert plan.file == 400 - len(plan.taken[SUBMITTED])


def test_three_sources_share_and_one_that_runs_out_leaves_its_share_to_the_others(file, encoder) -> None:
    plan = mix(file, encoder).plan(5, 300, 0, {SUBMITTED: waiting(100), APPLICATION: waiting(40)})
    assert (len(plan.taken[SUBMITTED]), len(plan.taken[APPLICATION])) == (100, 40)
    assert plan.file == 160
    first = [common_pb2.PromptTask.FromString(message.body).source for message in plan.messages[:90]]
    assert Counter(first) == pytest.approx({"file": 30, SUBMITTED: 30, APPLICATION: 30}, abs=3)


def test_a_source_without_weight_is_never_drawn(file, encoder) -> None:
    plan = mix(file, encoder, weights={"submitted": 0.0}).plan(0, 20, 0, {SUBMITTED: waiting(9)})
    assert (plan.file, plan.taken) == (20, {})


def test_mixing_and_restarts_neither_skip_nor_repeat_a_prompt_of_the_file(file, encoder) -> None:
    seen, turn, position, left = [], 0, 0, waiting(33)
    for count in (1, 7, 2, 19, 3, 28):  # a new plan by a new conductor each time
        plan = mix(file, encoder).plan(turn, count, position, {SUBMITTED: left})
        found = [common_pb2.PromptTask.FromString(message.body) for message in plan.messages]
        seen += [list(task.prompt_token_ids) for task in found if task.source == "file"]
        turn, position = turn + len(found), plan.file
        left = left[len(plan.taken.get(SUBMITTED, ())) :]
    assert seen == ids(tasks(mix(file, encoder), 0, len(seen)))
    assert 20 < len(seen) < 40


def test_a_waiting_prompt_that_cannot_be_used_is_taken_off_and_its_turn_goes_to_another(encoder) -> None:
    found = [*waiting(1), WaitingPrompt("long", generation_pb2.Prompt(text="much too long")), *waiting(3, 2)]
    plan = mix(None, encoder).plan(7, 10, 0, {SUBMITTED: found})
    assert plan.taken == {SUBMITTED: ["0-0", "long", "2-0"]}
    assert ([message.id for message in plan.messages], plan.refused) == (["r-7", "r-8"], 1)


def test_without_a_file_and_without_waiting_prompts_there_is_nothing_to_admit(encoder) -> None:
    assert mix(None, encoder).plan(0, 5, 0, {}).messages == []
    with pytest.raises(InvalidArgument, match="prompt_mix"):
        mix(None, encoder, weights={"submitted": 0.0, "application": 0.0})


def test_text_is_tokenised_messages_are_rendered_and_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    encoder = PromptEncoder(read_tokenizer(tmp_path), longest=9, render=lambda messages: [len(m["content"]) for m in messages])
    talk = [{"role": "user", "content": "four"}, {"role": "assistant", "content": "five!"}]
    path = write(
        tmp_path,
        {"text": "ab", "token_ids": None, "messages": None},
        {"token_ids": [7, 8, 9], "text": None},
        {"messages": talk},
    )
    with PromptFile(path, encoder) as file:
        assert [len(file), len(file[0].token_ids), file[1], file[2]] == [3, 2, FilePrompt([7, 8, 9]), FilePrompt([4, 5])]
        first = file[0].token_ids
    message = generation_pb2.ChatMessage(role="user", content="four")
    assert encoder.prompt(generation_pb2.Prompt(messages=generation_pb2.ChatMessages(messages=[message]))) == [4]
    assert encoder.prompt(generation_pb2.Prompt(text="ab")) == first
    assert encoder.prompt(generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=[3]))) == [3]
    with pytest.raises(InvalidArgument, match="content"):
        encoder.prompt(generation_pb2.Prompt())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "holds no prompts"),
        ('{"text": "a"}\n{"text": "b', "line 2: not JSON"),
        ('{"prompt": "a"}\n', "line 1: needs `text`, `token_ids` or `messages`"),
        ('{"text": null, "messages": null}\n', "line 1: needs `text`, `token_ids` or `messages`"),
        ('{"text": "a", "token_ids": [1]}\n', "line 1: .*one of them"),
        ("[1, 2]\n", "line 1: must be a JSON object"),
        ('{"token_ids": ["a"]}\n', "line 1"),
        ('{"token_ids": [1.5]}\n', "line 1"),
        ('{"token_ids": []}\n', "line 1"),
        ('{"token_ids": [-3]}\n', "line 1"),
        ('{"token_ids": [258]}\n', "each from 0 to 257"),
        ('{"text": ""}\n', "line 1"),
        ('{"text": "a"}\n\n{"text": "ten letters"}\n', "line 3: text: has 11 tokens; .* leave room for 9"),
        ('{"messages": []}\n', "line 1: messages"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: messages: must be a list of objects"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: messages: the model has no chat template"),
        ('{"text": "\\ud800"}\n', "line 1"),
        ('{"text": "a", "reference": "\\ud800"}\n', "line 1: reference: holds half a surrogate pair"),
        ('{"text": "a", "reference": [1e999]}\n', "line 1: reference: holds NaN or Infinity"),
        ('{"text": "a"}\n{"text": "a", "reference": "' + "é" * 32769 + '"}\n', "line 2: reference: has 65538 bytes, and 65536"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, encoder, content: str | None, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        PromptFile(path, encoder)
    assert "prompts.jsonl" in str(raised.value)


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path, encoder) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: not JSON"):
        check_prompts(path)


@pytest.mark.parametrize("content", [None, "", "\n", '{"text": "a"}\n{"te', '{"prompt": "a"}\n'])
def test_what_is_wrong_without_a_tokenizer_is_found_before_any_work(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"prompts\.jsonl"):
        check_prompts(path)


def test_the_check_of_a_long_file_tells_how_far_it_is(tmp_path: Path) -> None:
    shares: list[float] = []
    path = write(tmp_path, *({"token_ids": [number]} for number in range(5000)))
    assert check_prompts(path, shares.append) == 5000
    assert len(shares) >= 4
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_file_that_is_replaced_is_read_on_and_one_that_is_cut_is_an_error(tmp_path: Path, file) -> None:
    path = tmp_path / "prompts.jsonl"
    path.rename(tmp_path / "old")
    write(tmp_path, {"token_ids": [200]})
    assert file[3].token_ids == [3, 4]
    (tmp_path / "old").write_text("")
    assert file[3].token_ids == [3, 4], "read before"
    with pytest.raises(ValueError, match="has been changed since the run began"):
        file[4]


REFERENCES = [("42", "42"), (42, "42"), ({"é": [1, None]}, '{"é":[1,null]}'), (["a", "b"], '["a","b"]'), (None, ""), ("", "")]


@pytest.mark.parametrize(("given", "travels"), [*REFERENCES, (False, "false"), ("x" * 65536, "x" * 65536)])
def test_a_reference_travels_with_its_prompt_as_text(tmp_path: Path, encoder, given: object, travels: str) -> None:
    with PromptFile(write(tmp_path, {"text": "a", "reference": given}, {"text": "b"}), encoder) as file:
        assert {task.reference for task in tasks(mix(file, encoder), 0, 2)} == {travels, ""}


def test_a_submitted_prompt_keeps_its_reference(encoder) -> None:
    found = [WaitingPrompt("0-0", generation_pb2.Prompt(text="a", reference="seven"))]
    plan = mix(None, encoder).plan(0, 1, 0, {SUBMITTED: found})
    assert common_pb2.PromptTask.FromString(plan.messages[0].body).reference == "seven"
