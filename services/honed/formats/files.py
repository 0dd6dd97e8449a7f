"""Files of judgements, one JSON object a line: honed's own, and three that preference data is published in.

| format | a line | becomes |
|---|---|---|
| `honed` | `ImportJudgementsRequest` as protobuf JSON | itself, of any kind |
| `trl` | `prompt`, `chosen`, `rejected` as texts | pairwise, the chosen first |
| `hh` | `chosen`, `rejected` as transcripts that share all but the last turn of the assistant | pairwise, the chosen first |
| `summarize` | `info`, `summaries`, `choice`, `worker` of summarize-from-feedback's comparisons | pairwise, as shown |

Reading streams: memory holds one line. A line without a key of its own gets one from its source, number and content, so that
importing the same file again stores nothing twice. Who judged is no part of the key: a digest of few candidates can be guessed
back, and the key stays when an annotator is erased.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from google.protobuf import json_format

from honed.formats import published
from honed.formats.published import FormatError
from honed.judgements import Entry, check_judgement
from honed.kit.errors import HonedError, InvalidArgument, NotFound
from honed.v1 import preference_pb2 as pb

_QUOTED = 80


@dataclass(frozen=True)
class Defaults:
    """What the foreign formats do not say: where the data comes from, who judged, labels to select it by."""

    source: str
    annotator: str = "unknown"
    labels: Mapping[str, str] = field(default_factory=dict)


class BadLine(HonedError):
    """A line that is no judgement of the format. The message names file and line."""

    code = InvalidArgument.code


@dataclass(frozen=True)
class Format:
    """One format: how a line's object becomes a judgement, and a judgement an object.

    `parse` raises FormatError with the reason. `render` gives None for a judgement that the format has no place for.
    """

    parse: Callable[[dict[str, Any]], pb.Judgement]
    render: Callable[[pb.Judgement], dict[str, Any] | None]


def read_judgements(
    path: str | os.PathLike[str], name: str, defaults: Defaults, bad: Callable[[BadLine], None] | None = None
) -> Iterator[Entry]:
    """Yields the judgements of a file, checked, each under its idempotency key. Empty lines are passed over.

    Args:
        path: a UTF-8 file.
        name: one of `FORMATS`.
        defaults: what the format does not say. For `honed` only the labels are used, where a line has none of that name.
        bad: called for each broken line, which is then passed over.

    Raises:
        InvalidArgument: no such format.
        NotFound: no such file.
        BadLine: a line is broken, and `bad` is None; judgements before it have been yielded.
    """
    form = _format(name)
    try:
        file = open(path, encoding="utf-8-sig", newline="\n")  # noqa: SIM115  # closed below; other errors are not ours to name
    except FileNotFoundError as error:
        raise NotFound(f"no file {os.fspath(path)}; name an existing one") from error
    with file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    entry = _read_line(line, number, name, form, defaults)
                except (InvalidArgument, ValueError, RecursionError) as error:
                    broken = _broken(error, path, number, name, line)
                    if bad is None:
                        raise broken from error
                    bad(broken)
                else:
                    yield entry
        except UnicodeDecodeError as error:
            raise BadLine(f"{os.fspath(path)}, after line {number}: not UTF-8 ({error.reason}); convert it") from error


def write_judgements(judgements: Iterable[pb.Judgement], name: str, file: TextIO) -> tuple[int, int]:
    """Writes one line a judgement.

    Args:
        judgements: what to write.
        name: one of `FORMATS`.
        file: open for writing.

    Returns:
        How many were written, and how many were left out because the format has no place for them, such as ties in `trl`.

    Raises:
        InvalidArgument: no such format.
    """
    form = _format(name)
    written = left_out = 0
    for judgement in judgements:
        rendered = form.render(judgement)
        if rendered is None:
            left_out += 1
            continue
        file.write(json.dumps(rendered, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n")
        written += 1
    return written, left_out


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise InvalidArgument("format", f"no format {name!r}; there are " + ", ".join(FORMATS))
    return FORMATS[name]


def _broken(error: Exception, path: str | os.PathLike[str], number: int, name: str, line: str) -> BadLine:
    where = f"{os.fspath(path)}, line {number}"
    if isinstance(error, InvalidArgument):
        return BadLine(f"{where}: {error}")
    return BadLine(f"{where}: no judgement in format {name!r}: {error}; it starts {line[:_QUOTED]!r}")


def _read_line(line: str, number: int, name: str, form: Format, defaults: Defaults) -> Entry:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise FormatError("not a JSON object")
    key = record.get("idempotency_key", "") if name == "honed" else ""
    if not isinstance(key, str):
        raise FormatError("idempotency_key is no text")
    judgement = form.parse(record)
    if name != "honed":
        judgement.source = defaults.source
        judgement.annotator = judgement.annotator or defaults.annotator
    key = key or _derived_key(judgement, number)
    for label, value in defaults.labels.items():
        if label not in judgement.labels:
            judgement.labels[label] = value
    entry = Entry(key, judgement)
    _check_rules(pb.ImportJudgementsRequest(judgement=entry.judgement, idempotency_key=entry.key))
    check_judgement(judgement)
    return entry


def _check_rules(request: pb.ImportJudgementsRequest) -> None:
    """Checks the contract's rules where their library is installed. The service checks them in any case, by message number."""
    try:
        import protovalidate
    except ModuleNotFoundError:
        return
    try:
        protovalidate.validate(request)
    except protovalidate.ValidationError as error:
        raise FormatError(str(error)) from error


def _derived_key(judgement: pb.Judgement, number: int) -> str:
    content = pb.Judgement()
    content.CopyFrom(judgement)
    content.ClearField("annotator")
    # Fixed length, whatever the source: the contract allows 128 characters.
    return f"line-{number}-{hashlib.sha256(content.SerializeToString(deterministic=True)).hexdigest()[:40]}"


def _parse_honed(record: dict[str, Any]) -> pb.Judgement:
    request = pb.ImportJudgementsRequest()
    try:
        json_format.ParseDict(record, request)
    except json_format.ParseError as error:
        raise FormatError(str(error)) from error
    if not request.HasField("judgement"):
        raise FormatError("no field 'judgement'")
    return request.judgement


def _render_honed(judgement: pb.Judgement) -> dict[str, Any]:
    rendered: dict[str, Any] = json_format.MessageToDict(judgement, preserving_proto_field_name=True)
    rendered.pop("id", None)  # of the database that it left
    return {"judgement": rendered}


FORMATS: dict[str, Format] = {
    "honed": Format(_parse_honed, _render_honed),
    "trl": Format(published.parse_trl, published.render_trl),
    "hh": Format(published.parse_hh, published.render_hh),
    "summarize": Format(published.parse_summarize, published.render_summarize),
}
"""The formats by the name that the command line takes."""
