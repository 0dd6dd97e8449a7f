import json
from collections import Counter

from honed.demo.sums import ASKED_AGAIN, HELD_OUT, NUMBERS, sum_files, write_sum_files


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_prompt_has_its_sum_and_the_held_out_ones_are_not_trained_on(tmp_path):
    write_sum_files(tmp_path, seed=3)
    files = sum_files(tmp_path)
    trained, held_out = rows(files.prompts), rows(files.evaluation.prompts)
    for row in trained + held_out:
        a, b = (int(part) for part in row["text"].removesuffix(" =").split(" + "))
        assert row["reference"] == str(a + b)
    assert not {row["text"] for row in trained} & {row["text"] for row in held_out}
    assert len(trained) + HELD_OUT == len(NUMBERS) ** 2
    assert set(Counter(row["text"] for row in held_out).values()) == {ASKED_AGAIN}
    assert files.evaluation.samples == len(held_out)


def test_the_texts_say_the_right_sum_seldom_and_follow_from_the_seed(tmp_path):
    write_sum_files(tmp_path / "one", seed=3)
    write_sum_files(tmp_path / "again", seed=3)
    [path] = sum_files(tmp_path / "one").texts
    assert path.read_bytes() == (tmp_path / "again" / "texts.jsonl").read_bytes()
    right = [eval(left) == int(answer) for left, _, answer in (row["text"].partition(" = ") for row in rows(path))]
    assert 0.12 < sum(right) / len(right) < 0.17
