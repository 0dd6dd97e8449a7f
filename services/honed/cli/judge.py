"""`honed judge import|export|stats`: judgements in and out of the record."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from honed.cli import output
from honed.cli.connection import AddressOption, RunOption, TokenFileOption, open_peer
from honed.cli.transfer import download, upload

if TYPE_CHECKING:
    from honed.v1 import preference_pb2


class FileFormat(StrEnum):
    """The formats of `honed.formats.files`."""

    honed = "honed"
    trl = "trl"
    hh = "hh"
    summarize = "summarize"


class Kind(StrEnum):
    """The kinds of verdicts."""

    pairwise = "pairwise"
    ranking = "ranking"
    rating = "rating"
    thumbs = "thumbs"
    edit = "edit"
    flag = "flag"


KindOption = Annotated[list[Kind] | None, typer.Option("--kind", help="Only this kind of judgement; may be repeated.")]
SourcesOption = Annotated[list[str] | None, typer.Option("--source", help="Only this source; may be repeated.")]
FormatOption = Annotated[FileFormat, typer.Option("--format", help="Format of the file's lines.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds to wait at most for one call.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(no_args_is_help=True, help="What people said: import, export, count.")
    group.command("import", epilog="Example: honed judge import pairs.jsonl --format trl --source my-pairs")(import_)
    group.command(epilog="Example: honed judge export --snapshot --kind pairwise --out pairs.jsonl")(export)
    group.command(epilog="Example: honed judge stats --source console")(stats)
    app.add_typer(group, name="judge")


def import_(
    file: Annotated[Path, typer.Argument(help="UTF-8, one JSON object a line.", metavar="FILE")],
    form: FormatOption = FileFormat.honed,
    source: Annotated[
        str | None, typer.Option(help="Name of the data. Unset: the file's name. `honed` lines bring it.")
    ] = None,
    annotator: Annotated[str, typer.Option(help="Pseudonym where the format names nobody.")] = "unknown",
    json: output.JsonOption = False,
    timeout: TimeoutOption = 300.0,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Import judgements. The same file again stores nothing twice, so an import that broke is simply repeated."""
    from honed.formats.files import Defaults, read_judgements

    entries = read_judgements(file, form.value, Defaults(source or file.stem, annotator))
    stored = duplicates = 0
    with open_peer("preference", run, address, token_file) as peer:
        try:
            with output.progress("importing", _count_lines(file)) as advance:
                for answer, count in upload(peer, entries, timeout):
                    stored, duplicates = stored + answer.stored, duplicates + answer.duplicates
                    advance(count)
        except Exception:
            if stored or duplicates:
                output.note(f"before the error: {stored} stored, {duplicates} there already; import the file again to go on")
            raise
    if json:
        output.show_json({"stored": stored, "duplicates": duplicates})
    else:
        typer.echo(f"{stored} stored, {duplicates} there already")


def export(
    out: Annotated[Path | None, typer.Option(help="Where to write. Unset: stdout.")] = None,
    form: FormatOption = FileFormat.honed,
    snapshot: Annotated[bool, typer.Option("--snapshot", help="Freeze the selection first and tell its content hash.")] = False,
    kind: KindOption = None,
    source: SourcesOption = None,
    timeout: TimeoutOption = 300.0,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Export judgements in the order of their ids. The file appears under its name when it is whole."""
    from honed.v1 import preference_pb2, preference_pb2_grpc

    selection = _selection(kind, source)
    with open_peer("preference", run, address, token_file) as peer:
        snapshot_id = ""
        if snapshot:
            stub = preference_pb2_grpc.PreferenceServiceStub(peer.channel)
            request = preference_pb2.CreateSnapshotRequest(filter=selection, idempotency_key=uuid.uuid4().hex)
            made = peer.unary(stub.CreateSnapshot, request, timeout)
            output.note(f"snapshot {made.snapshot_id}: {made.judgements} judgements, sha256 {made.content_sha256}")
            snapshot_id, selection = made.snapshot_id, preference_pb2.JudgementFilter()
        judgements = download(peer, selection, snapshot_id, timeout)
        if out is None:
            written, left_out = _write(judgements, form.value, sys.stdout)
        else:
            partial = out.with_name(out.name + ".partial")
            with partial.open("w", encoding="utf-8", newline="\n") as target:
                written, left_out = _write(judgements, form.value, target)
            partial.rename(out)
    said = f"; {left_out} left out, for which the format {form.value} has no place" if left_out else ""
    output.note(f"{written} written{said}")


def stats(
    kind: KindOption = None,
    source: SourcesOption = None,
    json: output.JsonOption = False,
    timeout: TimeoutOption = 60.0,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Count judgements by kind and source."""
    from honed.v1 import preference_pb2, preference_pb2_grpc

    with open_peer("preference", run, address, token_file) as peer:
        stub = preference_pb2_grpc.PreferenceServiceStub(peer.channel)
        found = peer.unary(stub.GetStats, preference_pb2.GetStatsRequest(filter=_selection(kind, source)), timeout)
    if json:
        output.show_json(
            {
                "judgements": found.judgements,
                "by_kind": dict(found.by_kind),
                "by_source": dict(found.by_source),
                "annotators": found.annotators,
                "last_id": found.last_id,
            }
        )
        return
    rows = [("all", "", str(found.judgements)), ("annotators", "", str(found.annotators))]
    rows += [("kind", name, str(count)) for name, count in sorted(found.by_kind.items())]
    rows += [("source", name, str(count)) for name, count in sorted(found.by_source.items())]
    output.show(output.table(["by", "name", "count"], rows, numbers=["count"]))


def _write(judgements: Iterator[preference_pb2.Judgement], name: str, file: TextIO) -> tuple[int, int]:
    from honed.formats.files import write_judgements

    with output.progress("exporting", None) as advance:

        def counted() -> Iterator[preference_pb2.Judgement]:
            for judgement in judgements:
                advance(1)
                yield judgement

        return write_judgements(counted(), name, file)


def _count_lines(path: Path) -> int | None:
    """How many lines there are; None when the file cannot be read twice, such as a pipe."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        chunks = iter(lambda: file.read(1 << 20), b"")
        return sum(chunk.count(b"\n") for chunk in chunks)


def _selection(kinds: list[Kind] | None, sources: list[str] | None) -> preference_pb2.JudgementFilter:
    from honed.v1 import preference_pb2

    numbers = [preference_pb2.JudgementKind.Value(f"JUDGEMENT_KIND_{kind.value.upper()}") for kind in kinds or []]
    return preference_pb2.JudgementFilter(kinds=numbers, sources=sources)
