"""The files of `honed data best-of`: prompts in, demonstrations and comparisons out, and what of them is there already."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from google.protobuf import json_format

from honed._client.judgements import judgement
from honed.kit.appended import AppendedLines
from honed.kit.errors import InvalidArgument
from honed.kit.jsonl import read_lines
from honed.models.prompt_rows import at_line, check_row, row_prompt, row_reference
from honed.v1 import preference_pb2

if TYPE_CHECKING:
    from honed.client import Sample

SOURCE: Final = "best-of-n"
"""Of the comparisons."""
WHOLE_REWARD: Final = "reward"
"""Their annotator where no single scorer decides."""


@dataclass(frozen=True)
class Choice:
    """How the best response is chosen: among how many, by which scorer; empty for the whole reward."""

    candidates: int
    scorer: str = ""

    def value(self, sample: Sample) -> float:
        """What decides about a sample."""
        if not self.scorer:
            assert sample.reward is not None, "the service was asked for the best"
            return sample.reward
        return next(score.value for score in sample.scores if score.scorer == self.scorer)


@dataclass(frozen=True)
class PromptLine:
    """A prompt of the file.

    Attributes:
        line: Its line, from 1.
        index: Which prompt of the file it is, from 0.
        kind: `text`, `token_ids` or `messages`.
        row: The whole object.
        prompt_id: Names content, reference, and which of equal prompts it is.
    """

    line: int
    index: int
    kind: str
    row: dict[str, Any]
    prompt_id: str


def read_prompts(path: Path, *, as_text: bool) -> Iterator[PromptLine]:
    """Yields the prompts of a file.

    Args:
        path: JSON lines with `text`, `token_ids` or `messages`, and `reference` where there is one.
        as_text: Whether each must be text: a judgement keeps its prompt so.

    Raises:
        ValueError: The file cannot be read, or a line holds no such prompt; names file and line.
    """
    seen: Counter[str] = Counter()
    for index, (line, row) in enumerate(read_lines(path)):
        try:
            row_prompt(row)
            kind = check_row(row)
            if as_text and kind != "text":
                raise InvalidArgument(kind, "comparisons keep their prompt as text: give `text`, or leave out --comparisons")
            digest = _digest(row)
        except InvalidArgument as error:
            raise at_line(path, line, error) from error
        yield PromptLine(line, index, kind, row, f"{digest}-{seen[digest]}")
        seen[digest] += 1


class BestOfFiles:
    """What the command has made. Use it as a context manager: the files then belong to this process.

    A prompt counts as done once its demonstration is there; its comparison is written before that.
    """

    def __init__(self, demonstrations: Path, comparisons: Path | None, choice: Choice) -> None:
        """Opens nothing.

        Args:
            demonstrations: Where the best responses go.
            comparisons: Where best and worst go; None for nowhere.
            choice: By which they are made.
        """
        self._demonstrations = AppendedLines(demonstrations)
        self._comparisons = None if comparisons is None else AppendedLines(comparisons)
        self._choice = choice
        self._files = ExitStack()
        self._compared: set[str] = set()
        self.done: set[str] = set()

    def __enter__(self) -> Self:
        """Opens the files and reads what is done.

        Raises:
            FailedPrecondition: Another process writes to one of them.
            ValueError: A line of them is not of this command, or was made by another choice; names file and line.
        """
        with ExitStack() as files:
            files.enter_context(self._demonstrations)
            if self._comparisons is not None:
                files.enter_context(self._comparisons)
            self._read()
            self._files = files.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, prompt: PromptLine, samples: Sequence[Sample]) -> tuple[float, bool]:
        """Writes what became of a prompt; returns what the best response is worth, and whether there is a comparison.

        Args:
            prompt: As it was read.
            samples: The best first; all candidates where comparisons are wanted.

        Raises:
            ValueError: No response has any text, and there is nothing to learn from.
        """
        told = [sample for sample in samples if sample.text]
        if not told:
            raise ValueError("the best response is empty, which demonstrates nothing")
        best, worst = told[0], told[-1]
        compared = self._choice.value(best) > self._choice.value(worst)
        if self._comparisons is not None and compared and prompt.prompt_id not in self._compared:
            self._comparisons.append(_comparison(prompt, best, worst, self._choice))
            self._compared.add(prompt.prompt_id)
        self._demonstrations.append(_demonstration(prompt, best, self._choice))
        self.done.add(prompt.prompt_id)
        return self._choice.value(best), compared

    def _read(self) -> None:
        choice = self._choice
        for line, row in self._demonstrations.rows():
            place = f"{self._demonstrations.path}, line {line}"
            if not {"prompt_id", "candidates", "scorer"} <= row.keys():
                raise ValueError(f"{place}: no line of this command: name another file")
            if (row["candidates"], row["scorer"] or "") != (choice.candidates, choice.scorer):
                made = f"the best of {row['candidates']} by {row['scorer'] or 'the whole reward'}"
                raise ValueError(f"{place}: made by {made}: ask for the same, or name another file")
            self.done.add(str(row["prompt_id"]))
        if self._comparisons is not None:
            rows = (row for _, row in self._comparisons.rows())
            self._compared = {row.get("judgement", {}).get("labels", {}).get("prompt", "") for row in rows}


def _digest(row: dict[str, Any]) -> str:
    """Names a prompt's content with its reference."""
    kind = check_row(row)
    content = json.dumps([kind, row[kind], row_reference(row)], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _demonstration(prompt: PromptLine, best: Sample, choice: Choice) -> dict[str, Any]:
    return {
        **prompt.row,
        "prompt_id": prompt.prompt_id,
        "response": best.text,
        "score": choice.value(best),
        "reward": best.reward,
        "candidates": choice.candidates,
        "scorer": choice.scorer or None,
        "candidate": best.index,
        "versions": [str(span.version) for span in best.versions],
        "finish_reason": best.finish_reason,
    }


def _comparison(prompt: PromptLine, best: Sample, worst: Sample, choice: Choice) -> dict[str, Any]:
    """A judgement in the format `honed`, whose annotator is the scorer."""
    versions = {score.scorer: score.version for score in best.scores}
    labels = {
        "prompt": prompt.prompt_id,
        "candidates": str(choice.candidates),
        "scores": f"{choice.value(best):.6g} > {choice.value(worst):.6g}",
    }
    if choice.scorer:
        labels["scorer_version"] = versions[choice.scorer][:256]
    said = judgement([best, worst], choice.scorer or WHOLE_REWARD, {"source": SOURCE, "labels": labels})
    said.pairwise.CopyFrom(preference_pb2.PairwiseJudgement(preferred=0, other=1))
    said.ClearField("shown_order")  # nobody was shown anything
    return {"judgement": json_format.MessageToDict(said, preserving_proto_field_name=True)}
