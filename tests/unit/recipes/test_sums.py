import json
from collections import Counter, defaultdict

import pytest

from honed.kit.errors import FailedPrecondition
from honed.recipes.made.base import Sampled, find_made
from honed.recipes.made.sums import ASKED_AGAIN, HELD_OUT, LINES, NUMBERS

SUMS = find_made("sums")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_prompt_has_its_sum_and_the_held_out_ones_are_not_trained_on(tmp_path):
    SUMS.write(tmp_path, seed=3)
    files = SUMS.files(tmp_path)
    trained, held_out = rows(files.prompts), rows(files.evaluation.prompts)
    for row in trained + held_out:
        a, b = (int(part) for part in row["text"].removesuffix(" =").split(" + "))
        assert row["reference"] == str(a + b)
    assert not {row["text"] for row in trained} & {row["text"] for row in held_out}
    assert len(trained) + HELD_OUT == len(NUMBERS) ** 2
    assert set(Counter(row["text"] for row in held_out).values()) == {ASKED_AGAIN}
    assert files.evaluation.samples == len(held_out)


def test_the_texts_say_the_right_sum_seldom_and_follow_from_the_seed(tmp_path):
    SUMS.write(tmp_path / "one", seed=3)
    SUMS.write(tmp_path / "again", seed=3)
    [path] = SUMS.files(tmp_path / "one").texts
    assert path.read_bytes() == (tmp_path / "again" / "texts.jsonl").read_bytes()
    right = defaultdict(list)
    for row in rows(path):
        left, _, answer = row["text"].partition(" = ")
        named, _, numbers = left.rpartition(": ")
        right[named].append(sum(map(int, numbers.split(" + "))) == int(answer))
    assert {named: all(of) for named, of in right.items() if named} == {
        "sum": True,
        "first": False,
        "second": False,
        "difference": False,
    }
    assert 0.12 < sum(right[""]) / len(right[""]) < 0.17
    assert 0.73 < 1 - len(right[""]) / LINES < 0.77


def test_what_a_run_changed_is_the_share_of_right_answers():
    [change] = SUMS.measure(Sampled([], [], [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]), seed=3)
    assert (change.before, change.after) == (0.25, 0.75)
    with pytest.raises(FailedPrecondition, match="have no rewards: name a scorer"):
        SUMS.measure(Sampled([], [], [], []), seed=3)
