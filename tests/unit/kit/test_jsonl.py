"""Claims about files of JSON lines."""

from pathlib import Path

from honed.formats.files import Defaults, read_judgements
from honed.kit.jsonl import read_lines


def test_a_mark_of_the_encoding_at_the_beginning_of_a_file_is_no_part_of_its_first_line(tmp_path: Path) -> None:
    """The check reads bytes and took it; jobs ended at it after the pretraining."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a film"}\n', encoding="utf-8-sig")
    assert list(read_lines(path)) == [(1, {"text": "a film"})]
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8-sig")
    assert len(list(read_judgements(path, "trl", Defaults("shop", "ann")))) == 1
