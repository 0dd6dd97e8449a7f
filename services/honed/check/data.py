"""Checks the files of a run line by line."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from honed.check.findings import BadLines, Report
from honed.check.model import BaseModel
from honed.check.weights import WeightCheck
from honed.conductor.settings import JudgementsFile
from honed.config import RunSettings
from honed.formats.files import Defaults, read_judgements
from honed.kit.errors import HonedError, InvalidArgument
from honed.models.prompt_rows import ROW, check_row, row_reference, row_response
from honed.models.prompts import PromptEncoder, render_messages
from honed.recipes.made.base import awaited_files
from honed.v1 import preference_pb2

Advance = Callable[[int], None]
FAST_LINES = 200


class DataCheck:
    """The files of one run."""

    def __init__(self, settings: RunSettings, report: Report, model: BaseModel | None, advance: Advance, *, fast: bool) -> None:
        """Reads nothing yet.

        Args:
            settings: the run's.
            report: where findings go.
            model: what the run starts from; None if that cannot be used.
            advance: called with the bytes that were read.
            fast: read the first lines of each file only, and tokenise nothing.
        """
        self._settings, self._report, self._advance, self._fast = settings, report, advance, fast
        self._awaited = awaited_files(settings)
        self._template = model.template if model else None
        self._tokenizer = None if fast or model is None else model.tokenizer
        self._encode = self._encoder(settings.longest_prompt)
        # Of a demonstration a token of the response must fit behind it.
        self._encode_demonstrated = self._encoder(settings.generation.max_model_tokens - 1)

    def run(self) -> None:
        """Checks all of them."""
        data, report = self._settings.data, self._report
        if self._settings.conductor.start_from is None and not data.texts:
            report.error("data.texts", "there is nothing to pretrain on: name texts, or a model as conductor.start_from")
        for path in self._there(data.texts):
            self._texts(path)
        for path in self._there(data.demonstrations if self._settings.goes_through("sft") else ()):
            self._demonstrations(path)
        if data.prompts is None and self._settings.samples_rollouts and self._settings.goes_through("online"):
            report.error("data.prompts", "is not set: name JSON lines with `text`, `token_ids` or `messages` to train on")
        for where, prompts in (("data.prompts", data.prompts), ("data.evaluation.prompts", data.evaluation.prompts)):
            for path in self._there([prompts] if prompts is not None else ()):
                self._prompts(where, path)
        trained: set[bytes] = set()
        weights = WeightCheck(self._settings.reward_training)
        for number, source in enumerate(data.judgements):
            for _ in self._there([source.file]):
                trained |= self._judgements(f"data.judgements.{number}", source, weights.add)
        if self._settings.goes_through("reward_model"):
            weights.tell(report, whole=not self._fast)
        if data.evaluation.judgements is not None and self._there([data.evaluation.judgements.file]):
            where = "data.evaluation.judgements"
            held_out = self._judgements(where, data.evaluation.judgements)
            if shared := len(held_out & trained):
                report.warning(where, f"{shared} of {len(held_out)} judgements are also trained on: agreement will flatter")
        wanted = self._settings.goes_through("reward_model")
        why = "a scorer is `trained`" if wanted else f"learner.algorithm {self._settings.learner.algorithm} learns from them"
        if (wanted or not self._settings.samples_rollouts) and not data.judgements:
            report.warning("data.judgements", f"{why}, and none are named: the run waits for `honed judge import`")

    def _there(self, paths: Iterable[Path]) -> list[Path]:
        """Those that can be read now: what the run makes at its start is well made."""
        return [path for path in paths if path not in self._awaited]

    def _texts(self, path: Path) -> None:
        usable = empty = 0
        for _, row in self._rows("data.texts", path, _text_of):
            empty += not str(row["text"]).strip()
            usable += 1
        if usable == empty and path.is_file():
            self._report.error("data.texts", f"{path} holds no text")
        elif empty:
            self._report.warning("data.texts", f"{path}: {empty} of {usable} texts are empty")
        self._report.figures[f"texts {path}"] = usable

    def _demonstrations(self, path: Path) -> None:
        def usable(row: dict[str, Any]) -> str:
            reason, _ = self._prompt(row, self._encode_demonstrated)
            if not reason:
                try:
                    row_response(row)
                except InvalidArgument as error:
                    return str(error)
            return reason

        count = sum(1 for _ in self._rows("data.demonstrations", path, usable))
        if not count and path.is_file():
            self._report.error("data.demonstrations", f"{path} holds no demonstration that can be used")
        self._report.figures[f"demonstrations {path}"] = count

    def _prompts(self, where: str, path: Path) -> None:
        seen: set[bytes] = set()
        count = longest = references = 0

        def usable(row: dict[str, Any]) -> str:
            nonlocal longest
            reason, tokens = self._prompt(row, self._encode)
            longest = max(longest, tokens)
            return reason

        for _, row in self._rows(where, path, usable):
            count += 1
            references += bool(row_reference(row))
            seen.add(_digest(row.get("text") or row.get("messages") or row.get("token_ids")))
        if not count and path.is_file():
            self._report.error(where, f"{path} holds no prompt that can be used")
        if count > len(seen):
            self._report.warning(where, f"{path}: {count - len(seen)} of {count} prompts are duplicates")
        self._references(where, path, count - references, count)
        self._report.figures[f"prompts {path}"] = {
            "lines": count,
            "duplicates": count - len(seen),
            "longest_tokens": longest,
            "references": references,
        }

    def _references(self, where: str, path: Path, missing: int, count: int) -> None:
        """Says what becomes of prompts without a reference."""
        needing = ", ".join(sorted(_needing_references(self._settings))) if missing else ""
        if needing:
            self._report.error(
                where,
                f"{path}: {missing} of {count} prompts have no `reference`, and the scorers {needing} need one: give them "
                "one, or say by the scorer's option `missing` what such a prompt's responses score",
            )
        elif 0 < missing < count:
            self._report.warning(where, f"{path}: {missing} of {count} prompts have no `reference`, and the others have one")

    def _encoder(self, longest: int) -> PromptEncoder | None:
        if self._tokenizer is None:
            return None
        return PromptEncoder.of_tokenizer(self._tokenizer, self._template, longest=longest)

    def _prompt(self, row: dict[str, Any], encode: PromptEncoder | None) -> tuple[str, int]:
        """What is wrong with a prompt, empty if nothing; and its tokens, 0 if they cannot be counted."""
        try:
            if encode is not None:
                return "", len(encode(row))
            if check_row(row) == "messages":
                render_messages(self._template, row["messages"])
        except InvalidArgument as error:
            return error.reason if error.field == ROW else str(error), 0
        return "", 0

    def _judgements(
        self, where: str, source: JudgementsFile, see: Callable[[preference_pb2.Judgement], None] = lambda _: None
    ) -> set[bytes]:
        seen: set[bytes] = set()
        count = cut = read = 0
        report, limit = self._report, self._settings.generation.max_model_tokens
        if not _readable(where, source.file, report):
            return seen
        with report.lines(where) as bad:
            try:
                entries = read_judgements(
                    source.file, source.format, Defaults(source.source, source.annotator), lambda line: bad.add(str(line))
                )
                for entry in entries:
                    count += 1
                    see(entry.judgement)
                    texts = [response.text for response in entry.judgement.responses]
                    seen.add(_digest([entry.judgement.prompt, sorted(texts)]))
                    if self._tokenizer is not None:
                        encoded = self._tokenizer.encode_batch([entry.judgement.prompt + text for text in texts])
                        cut += any(len(encoding.ids) > limit for encoding in encoded)
                    size = entry.judgement.ByteSize()
                    read += size
                    self._advance(size)
                    if self._fast and count >= FAST_LINES:
                        break
            except HonedError as error:
                bad.add(str(error))
        if not count and not bad.count:
            report.error(where, f"{source.file} holds no judgement")
        if count > len(seen):
            report.warning(where, f"{source.file}: {count - len(seen)} of {count} judgements are of responses judged before")
        if cut:
            report.warning(where, f"{source.file}: {cut} judgements are longer than generation.max_model_tokens ({limit}); cut")
        self._advance(max(0, source.file.stat().st_size - read))
        report.figures[f"judgements {source.file}"] = {"lines": count, "repeated": count - len(seen), "too_long": cut}
        return seen

    def _rows(self, where: str, path: Path, wrong: Callable[[dict[str, Any]], str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the lines that can be used; the others become findings."""
        if not _readable(where, path, self._report):
            return
        with self._report.lines(where) as bad, path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                self._advance(len(line))
                if self._fast and number > FAST_LINES:
                    return
                row = _object(line, path, number, bad)
                if row is None:
                    continue
                if reason := wrong(row):
                    bad.add(f"{path}, line {number}: {reason}")
                else:
                    yield number, row


def _needing_references(settings: RunSettings) -> Iterator[str]:
    from honed.reward.function_scorer import find_function

    for scorer in settings.reward.scorers:
        if scorer.kind == "function":
            with contextlib.suppress(HonedError):  # a finding of the scorers' own check
                if find_function(scorer.name, scorer.source, scorer.options).needs_reference:
                    yield scorer.name


def data_bytes(settings: RunSettings) -> int:
    """Bytes of all files of a run that are there."""
    data = settings.data
    paths = [
        *data.texts,
        *data.demonstrations,
        data.prompts,
        data.evaluation.prompts,
        *(source.file for source in data.judgements),
    ]
    if data.evaluation.judgements:
        paths.append(data.evaluation.judgements.file)
    return sum(path.stat().st_size for path in paths if path is not None and path.is_file())


def _readable(where: str, path: Path, report: Report) -> bool:
    try:
        with path.open("rb"):
            return True
    except OSError as error:
        report.error(where, f"{path} cannot be read: {error.strerror}")
        return False


def _object(line: bytes, path: Path, number: int, bad: BadLines) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        bad.add(f"{path}, line {number}: not UTF-8 ({error.reason}); convert it")
        return None
    except ValueError as error:
        bad.add(f"{path}, line {number}: not JSON ({error}); is the file truncated?")
        return None
    if not isinstance(row, dict):
        bad.add(f"{path}, line {number}: must be a JSON object, is a {type(row).__name__}")
        return None
    return row


def _text_of(row: dict[str, Any]) -> str:
    return "" if isinstance(row.get("text"), str) else "needs `text`"


def _digest(value: object) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=12).digest()
