"""`honed score`: what responses are worth to the live reward."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from honed.cli import output
from honed.cli.connection import AddressOption, RunOption, TokenFileOption, open_peer

if TYPE_CHECKING:
    from honed.client import Client, Scored, ScorerValue

_AT_ONCE = 256


@dataclass(frozen=True)
class _Item:
    """A response, its prompt and reference if it has them, and where it stands, for errors."""

    place: str
    prompt: str | None
    response: str
    reference: str = ""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: honed score --prompt 'the film was' 'a delight' 'a bore'")(score)


def score(
    responses: Annotated[list[str] | None, typer.Argument(help="What to score.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the responses answer. Unset: they stand alone.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="JSON lines with `response` and, where there are such, `prompt` and `reference`."),
    ] = None,
    reference: Annotated[str, typer.Option(help="What scorers compare the responses with, such as the right answer.")] = "",
    json: output.JsonOption = False,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds to wait at most for each 256 responses.")] = 60.0,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Score responses by the reward that the learner sees: the weighted sum, and each scorer's own value and version."""
    from honed.client import Client

    if bool(responses) == (file is not None):
        raise typer.BadParameter("give responses, or --file, one of the two")
    items = _from_file(file, prompt, reference) if file is not None else _from_words(responses or [], prompt, reference)
    with Client.over(open_peer("reward", run, address, token_file), timeout=timeout) as client:
        results = _scored(client, items)
        if json:
            for item, result in results:
                output.show_json({"prompt": item.prompt, "response": item.response, **asdict(result)})
        else:
            _show(list(results))


def _from_words(responses: Iterable[str], prompt: str | None, reference: str) -> Iterator[_Item]:
    for number, response in enumerate(responses, start=1):
        yield _Item(f"response {number}", prompt, response, reference)


def _from_file(path: Path, prompt: str | None, reference: str) -> Iterator[_Item]:
    from honed.kit.errors import InvalidArgument
    from honed.kit.jsonl import read_lines
    from honed.models.prompt_rows import at_line, row_reference

    for number, row in read_lines(path):
        place = f"{path}, line {number}"
        values = {"prompt": row.get("prompt", prompt), "response": row.get("response")}
        for name, value in values.items():
            if not isinstance(value, str) and not (name == "prompt" and value is None):
                raise ValueError(f"{place}: `{name}` must be a text, is {'missing' if value is None else repr(value)}")
        try:
            own = row_reference(row)
        except InvalidArgument as error:
            raise at_line(path, number, error) from error
        yield _Item(place, values["prompt"], str(values["response"]), own or reference)


def _scored(client: Client, items: Iterable[_Item]) -> Iterator[tuple[_Item, Scored]]:
    """Scores a bounded number at once; an error names the item's own place, not its place in the request."""
    from honed.client import RequestError

    waiting = iter(items)
    while batch := list(itertools.islice(waiting, _AT_ONCE)):
        try:
            pairs = [i.response if i.prompt is None else (i.prompt, i.response) for i in batch]
            results = client.score(pairs, references=[i.reference for i in batch])
        except RequestError as error:
            named = re.match(r"items\[(\d+)\]", error.field)
            place = batch[int(named[1])].place if named else f"{batch[0].place} to {batch[-1].place}"
            raise error.at(place) from error
        yield from zip(batch, results, strict=True)


def _value(score: ScorerValue) -> str:
    """A value; of an ensemble with its members' deviation."""
    return f"{score.value:+.4f}" + (f" ± {score.deviation:.4f}" if score.members else "")


def _show(results: list[tuple[_Item, Scored]]) -> None:
    scorers = [score.scorer for score in results[0][1].scores] if results else []
    rows: list[list[str]] = []
    cut = 0
    for item, result in results:
        values = {score.scorer: _value(score) for score in result.scores}
        cut += any(score.truncated_tokens for score in result.scores)
        rows.append([output.shortened(item.response), f"{result.reward:+.4f}", *(values.get(name, "") for name in scorers)])
    output.show(output.table(["response", "reward", *scorers], rows, numbers=["reward", *scorers]))
    if results:
        output.note("  " + ", ".join(f"{s.scorer} version {s.version} weight {s.weight:g}" for s in results[0][1].scores))
    if cut:
        output.note(f"  {cut} responses were too long for a scorer, which saw only a part; --json tells which")
