"""`honed prompts`: give a run that is up more prompts to train on, and see how many wait."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from honed.cli import output
from honed.cli.connection import AddressOption, RunOption, TokenFileOption, open_peer

if TYPE_CHECKING:
    from honed.v1 import generation_pb2

_BATCH = 512
_BATCH_BYTES = 8 * 1024 * 1024
_TIMEOUT_S = 30.0

JsonLinesArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILE", help="JSON lines with `text`, `token_ids` or `messages`, and `reference` if any; - is standard input."
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(no_args_is_help=True, help="Prompts that the run trains on: add some, see how many wait.")
    group.command(epilog="Example: honed prompts add more.jsonl, or tail -f prompts.jsonl | honed prompts add -")(add)
    group.command(epilog="Example: honed prompts status")(status)
    app.add_typer(group, name="prompts")


def add(
    file: JsonLinesArgument,
    key: Annotated[
        str | None,
        typer.Option("--key", help="Idempotency key: the same file under the same key, within a day, is added once."),
    ] = None,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for room, for each 512 prompts, when too many wait already.")
    ] = 600.0,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Add prompts to the run, in order. All of a batch of 512 are added, or none."""
    import uuid

    from honed.client import RequestError
    from honed.v1 import conductor_pb2, conductor_pb2_grpc

    key, done, waiting = key or uuid.uuid4().hex, 0, 0
    with open_peer("conductor", run, address, token_file) as peer:
        stub = conductor_pb2_grpc.ConductorServiceStub(peer.channel)
        for number, batch in enumerate(_batches(file)):
            request = conductor_pb2.SubmitPromptsRequest(prompts=batch, idempotency_key=f"{key}-{number}")
            try:
                waiting = peer.unary(stub.SubmitPrompts, request, patience).waiting
            except RequestError as error:
                raise error.at(f"prompts {done + 1} to {done + len(batch)} of {file}; {done} were added") from error
            done += len(batch)
    output.note(f"{done} prompts added; {waiting} wait")


def status(
    as_json: output.JsonOption = False,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Show how many prompts the run has admitted, and how many of each source wait."""
    from honed.v1 import conductor_pb2, conductor_pb2_grpc

    with open_peer("conductor", run, address, token_file) as peer:
        stub = conductor_pb2_grpc.ConductorServiceStub(peer.channel)
        found = peer.unary(stub.GetRun, conductor_pb2.GetRunRequest(), _TIMEOUT_S).run
    row = {"admitted": int(found.prompts_admitted)}
    for name, figure in (
        ("submitted_waiting", "prompts_submitted_waiting"),
        ("application_waiting", "prompts_application_waiting"),
        ("refused", "prompts_refused"),
    ):
        row[name] = int(found.figures.get(figure, 0))
    if as_json:
        output.show_json(row)
    else:
        output.show(output.pairs({name.replace("_", " "): str(count) for name, count in row.items()}))


def _batches(file: str) -> Iterator[list[generation_pb2.Prompt]]:
    batch: list[generation_pb2.Prompt] = []
    size = 0
    for prompt in _prompts(file):
        batch.append(prompt)
        size += prompt.ByteSize()
        if len(batch) >= _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _prompts(file: str) -> Iterator[generation_pb2.Prompt]:
    """The prompts of the file.

    Raises:
        ValueError: it cannot be read, or a line holds no prompt; names file and line.
    """
    from honed.kit.errors import InvalidArgument
    from honed.models.prompt_rows import at_line, row_prompt

    for number, row in _rows(file):
        try:
            yield row_prompt(row)
        except InvalidArgument as error:
            raise at_line(file, number, error) from error


def _rows(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    from honed.kit.jsonl import parse_lines, read_lines

    yield from parse_lines(sys.stdin, "standard input") if file == "-" else read_lines(Path(file))
