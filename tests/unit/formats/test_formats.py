"""Files of judgements: every line becomes what it says, and a bad one is named."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.support.judgements import full

from honed.formats.files import BadLine, Defaults, read_judgements, write_judgements
from honed.kit.errors import InvalidArgument, NotFound
from honed.preference.content import KINDS
from honed.v1 import preference_pb2 as pb

DEFAULTS = Defaults("films", annotator="crowd", labels={"split": "train"})
TRL = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
HH = {
    "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
    "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad",
}
SUMMARIZE = {
    "info": {"id": "t3_1", "post": "A long post.", "title": "T"},
    "summaries": [{"text": "short", "policy": "sup"}, {"text": "better", "policy": "ppo"}],
    "choice": 1,
    "worker": "w9",
    "batch": "b3",
    "split": "valid",
    "extra": {"confidence": 7},
}


def write(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def read_one(path: Path, name: str, record: Any) -> pb.Judgement:
    (entry,) = read_judgements(write(path / "one.jsonl", [record]), name, DEFAULTS)
    return entry.judgement


def texts(judgement: pb.Judgement) -> list[str]:
    return [response.text for response in judgement.responses]


def test_trl_becomes_a_pair(tmp_path: Path) -> None:
    judgement = read_one(tmp_path, "trl", TRL)
    assert (judgement.prompt, texts(judgement)) == ("Q", ["good", "bad"])
    assert (judgement.pairwise.preferred, judgement.pairwise.other) == (0, 1)
    assert (judgement.source, judgement.annotator, dict(judgement.labels)) == ("films", "crowd", {"split": "train"})


def test_hh_is_parted_at_the_last_turn(tmp_path: Path) -> None:
    judgement = read_one(tmp_path, "hh", HH)
    assert judgement.prompt == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert texts(judgement) == [" good", " bad"]


def test_hh_that_parts_earlier_keeps_all_of_both(tmp_path: Path) -> None:
    record = {"chosen": HH["chosen"], "rejected": "\n\nHuman: a\n\nAssistant: other"}
    judgement = read_one(tmp_path, "hh", record)
    assert judgement.prompt == "\n\nHuman: a\n\nAssistant:"
    assert texts(judgement) == [" b\n\nHuman: c\n\nAssistant: good", " other"]


def test_a_summary_comparison_keeps_the_order_shown_and_the_worker(tmp_path: Path) -> None:
    judgement = read_one(tmp_path, "summarize", SUMMARIZE)
    assert (judgement.prompt, texts(judgement)) == ("A long post.", ["short", "better"])
    assert (judgement.pairwise.preferred, judgement.pairwise.other) == (1, 0)
    assert (judgement.annotator, list(judgement.shown_order)) == ("w9", [0, 1])
    assert dict(judgement.labels) == {"id": "t3_1", "batch": "b3", "split": "valid"}


def test_an_article_stands_for_a_post(tmp_path: Path) -> None:
    record = {**SUMMARIZE, "info": {"id": "x", "post": None, "article": "News."}, "choice": 0}
    judgement = read_one(tmp_path, "summarize", record)
    assert (judgement.prompt, judgement.pairwise.preferred) == ("News.", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_through_a_file_and_comes_back(tmp_path: Path, kind: str) -> None:
    judgement = full(kind)
    judgement.id = 5
    file = io.StringIO()
    assert write_judgements([judgement], "honed", file) == (1, 0)
    back = read_one(tmp_path, "honed", file.getvalue().strip())
    judgement.ClearField("id")
    assert back == judgement


@pytest.mark.parametrize(("name", "record"), [("trl", TRL), ("hh", HH)])
def test_a_foreign_format_is_written_as_it_was_read(tmp_path: Path, name: str, record: dict[str, str]) -> None:
    file = io.StringIO()
    assert write_judgements([read_one(tmp_path, name, record)], name, file) == (1, 0)
    assert json.loads(file.getvalue()) == record


def test_a_summary_comparison_is_written_with_its_choice(tmp_path: Path) -> None:
    file = io.StringIO()
    write_judgements([read_one(tmp_path, "summarize", SUMMARIZE)], "summarize", file)
    assert read_one(tmp_path, "summarize", file.getvalue().strip()) == read_one(tmp_path, "summarize", SUMMARIZE)


def test_what_a_format_cannot_say_is_left_out_and_counted(tmp_path: Path) -> None:
    tie = full()
    tie.pairwise.tie = True
    file = io.StringIO()
    assert write_judgements([full("rating"), tie, full()], "trl", file) == (1, 2)


def test_a_key_in_the_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    file = io.StringIO()
    write_judgements([full()], "honed", file)
    record = {**json.loads(file.getvalue()), "idempotency_key": "mine"}
    (entry,) = read_judgements(write(path, [record]), "honed", DEFAULTS)
    assert entry.key == "mine"


@pytest.mark.parametrize(("name", "record"), [("summarize", SUMMARIZE), ("trl", TRL)])
def test_a_derived_key_holds_nothing_of_who_judged(tmp_path: Path, name: str, record: dict[str, Any]) -> None:
    others = {**record, "worker": "somebody else"} if "worker" in record else record
    keys = []
    for number, (each, annotator) in enumerate(((record, "jane"), (others, "john"))):
        path = write(tmp_path / f"{number}.jsonl", [each])
        (entry,) = read_judgements(path, name, Defaults("films", annotator=annotator))
        keys.append(entry.key)
    assert keys[0] == keys[1]


def test_files_are_read_and_written_by_a_client_without_the_services_libraries(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [TRL])
    code = (
        "import sys\n"
        "for name in ('protovalidate', 'sqlalchemy', 'pydantic', 'alembic'): sys.modules[name] = None\n"
        "from honed.formats.files import Defaults, read_judgements, write_judgements\n"
        "entries = list(read_judgements(sys.argv[1], 'trl', Defaults('films')))\n"
        "print(write_judgements([entry.judgement for entry in entries], 'trl', sys.stderr))\n"
        "assert not [name for name in sys.modules if name.startswith('honed.preference')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "(1, 0)\n"), done.stderr


def test_derived_keys_are_stable_and_tell_equal_lines_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [TRL, "", TRL])
    keys = [entry.key for entry in read_judgements(path, "trl", DEFAULTS)]
    assert len(set(keys)) == 2
    assert keys == [entry.key for entry in read_judgements(path, "trl", DEFAULTS)]
    assert keys[0] != next(iter(read_judgements(path, "trl", Defaults("others")))).key
    assert max(map(len, keys)) <= 128


BAD_LINES = {
    "no JSON": ("trl", "{", "Expecting property name"),
    "no object": ("trl", "[1]", "not a JSON object"),
    "a text missing": ("trl", {"prompt": "", "chosen": ""}, "'rejected' is missing"),
    "no text": ("trl", {"prompt": "", "chosen": [], "rejected": ""}, "'chosen' is list"),
    "no turns": ("hh", {"chosen": "a", "rejected": "b"}, "no turn"),
    "nothing shared": ("hh", {"chosen": HH["chosen"], "rejected": "x"}, "share no turns"),
    "one summary": ("summarize", {**SUMMARIZE, "summaries": [{"text": ""}]}, "list of two"),
    "no such choice": ("summarize", {**SUMMARIZE, "choice": 2}, "'choice' is 2"),
    "a choice that is a truth": ("summarize", {**SUMMARIZE, "choice": True}, "'choice' is True"),
    "an unknown field": ("honed", {"judgment": {}}, "judgment"),
    "no judgement": ("honed", {"idempotency_key": "k"}, "no field 'judgement'"),
    "nobody": ("honed", {"judgement": {"source": "s", "edit": {"text": "a"}}}, "judgement.annotator"),
    "an index too far": (
        "honed",
        {"judgement": {"source": "s", "annotator": "a", "thumbs": {"response": 1}, "responses": [{"text": ""}]}},
        "judgement.thumbs.response: no response 1",
    ),
    "half a character": ("trl", '{"prompt": "\\ud800", "chosen": "", "rejected": ""}', "surrogate"),
    "endless nesting": ("trl", "[" * 200_000, "recursion"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_line_is_named_after_the_good_ones(tmp_path: Path, what: str) -> None:
    name, record, reason = BAD_LINES[what]
    good: Any = {"trl": TRL, "hh": HH, "summarize": SUMMARIZE}.get(name)
    if good is None:
        file = io.StringIO()
        write_judgements([full()], "honed", file)
        good = file.getvalue().strip()
    path = write(tmp_path / "some.jsonl", [good, record])
    entries = read_judgements(path, name, DEFAULTS)
    next(entries)
    with pytest.raises(BadLine) as caught:
        next(entries)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert reason in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(BadLine, match="not UTF-8"):
        list(read_judgements(path, "trl", DEFAULTS))


def test_a_missing_file_and_an_unknown_format_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        list(read_judgements(tmp_path / "nowhere", "trl", DEFAULTS))
    with pytest.raises(InvalidArgument, match="there are honed, trl, hh, summarize"):
        list(read_judgements(tmp_path / "nowhere", "csv", DEFAULTS))


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl", [TRL, "{"])
    entries = read_judgements(path, "trl", DEFAULTS)
    assert next(entries).judgement.prompt == "Q"  # the broken second line has not been looked at
    entries.close()
