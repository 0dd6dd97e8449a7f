"""`honed data best-of`: responses to learn from, each the best of several that the live policy gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from honed.cli import output
from honed.cli.connection import AddressOption, RunOption, TokenFileOption, open_peer

if TYPE_CHECKING:
    from honed.cli.best_of_rows import BestOfFiles, PromptLine
    from honed.client import Sample, SamplingOptions

_OF_EVERY_PROMPT = ("UNAUTHENTICATED", "PERMISSION_DENIED", "FAILED_PRECONDITION", "UNIMPLEMENTED")
"""Codes of failures that no other prompt can escape."""

Ask = Callable[["PromptLine"], "list[Sample]"]


@dataclass
class Outcome:
    """What became of the prompts.

    Attributes:
        written: Demonstrations added.
        there: Prompts whose demonstration was there already.
        failed: Prompts that have none now.
        comparisons: Judgements that go with what was written.
        mean_score: Of what was written; None if nothing was.
    """

    written: int = 0
    there: int = 0
    failed: int = 0
    comparisons: int = 0
    mean_score: float | None = None


def best_of(
    prompts: Annotated[
        Path,
        typer.Argument(help="JSON lines with `text`, `token_ids` or `messages`, and `reference` if any.", metavar="PROMPTS"),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Demonstrations, for data.demonstrations. What is there is not asked for again.")
    ],
    candidates: Annotated[int, typer.Option("--candidates", "-n", min=1, max=256, help="Responses to choose among.")] = 16,
    scorer: Annotated[str, typer.Option(help="Scorer that decides. Unset: the whole reward.")] = "",
    comparisons: Annotated[
        Path | None,
        typer.Option(help="Also write best against worst, for `honed judge import`; the annotator is the scorer."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens. Unset: the server's default.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Unset: 1.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a response; may be repeated.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Prompts that are asked at once.")] = 8,
    give_up_after: Annotated[int, typer.Option(min=1, help="Prompts that fail one after another before the job ends.")] = 10,
    json: output.JsonOption = False,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds to wait at most for one prompt.")] = 120.0,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Ask the live policy for several responses to each prompt, and keep the best by the run's reward.

    The same command again goes on where the last one ended. A prompt that fails is told of and left out, and asked for again
    the next time.
    """
    from honed.cli.best_of_rows import BestOfFiles, Choice, read_prompts
    from honed.client import Client

    total = sum(
        1 for _ in read_prompts(prompts, as_text=comparisons is not None)
    )  # every line is looked at before any is asked
    given = {"max_tokens": max_tokens, "temperature": temperature, "stop": stop}
    sampling: SamplingOptions = {name: value for name, value in given.items() if value is not None}  # type: ignore[assignment]
    outcome = Outcome()
    with ExitStack() as stack:
        files = stack.enter_context(BestOfFiles(out, comparisons, Choice(candidates, scorer)))
        # The client closes first: that ends calls under way, and with them the threads.
        pool = stack.enter_context(ThreadPoolExecutor(concurrency))
        client = stack.enter_context(Client.over(open_peer("generation", run, address, token_file), timeout=timeout))
        advance = stack.enter_context(output.progress("asking", total))

        def ask(prompt: PromptLine) -> list[Sample]:
            own: Any = sampling if seed is None else {**sampling, "seed": seed + prompt.index * candidates}
            return client.generate(
                prompt.row[prompt.kind],
                n=1 if comparisons is None else candidates,
                best_of=candidates,
                scorer=scorer,
                reference=_reference(prompt),
                **own,
            )

        def missing() -> Iterator[PromptLine]:
            for prompt in read_prompts(prompts, as_text=comparisons is not None):
                if prompt.prompt_id in files.done:
                    outcome.there += 1
                    advance(1)
                else:
                    yield prompt

        try:
            _make(_answers(missing(), ask, pool, concurrency), files, outcome, give_up_after, advance, prompts)
        finally:
            if json:
                output.show_json(asdict(outcome))
            else:
                typer.echo(_summary(outcome, comparisons is not None))
    if outcome.failed:
        raise typer.Exit(1)


def _make(
    answers: Iterator[tuple[PromptLine, Future[list[Sample]]]],
    files: BestOfFiles,
    outcome: Outcome,
    give_up_after: int,
    advance: Callable[[int], None],
    source: Path,
) -> None:
    """Writes the answers as they come.

    Raises:
        RequestError: A failure that every prompt would meet, or the last of too many in a row; names the prompt's line.
        ValueError: The same, where the response cannot be used.
    """
    from honed.client import RequestError

    in_a_row, summed = 0, 0.0
    for prompt, answer in answers:
        place = f"{source}, line {prompt.line}"
        try:
            score, compared = files.add(prompt, answer.result())
        except (RequestError, ValueError) as error:
            outcome.failed += 1
            in_a_row += 1
            if in_a_row >= give_up_after:
                place = f"{in_a_row} prompts failed one after another, the last at {place}"
            if in_a_row >= give_up_after or _is_of_every_prompt(error):
                raise (error.at(place) if isinstance(error, RequestError) else ValueError(f"{place}: {error}")) from error
            output.note(f"{place}: {error}")
        else:
            in_a_row = 0
            outcome.written += 1
            outcome.comparisons += compared
            summed += score
            outcome.mean_score = summed / outcome.written
        advance(1)


def _answers(
    prompts: Iterator[PromptLine], ask: Ask, pool: Executor, at_once: int
) -> Iterator[tuple[PromptLine, Future[list[Sample]]]]:
    """Asks a bounded number at once; yields each prompt with its answer as soon as that has come."""
    running: dict[Future[list[Sample]], PromptLine] = {}
    for prompt in prompts:
        running[pool.submit(ask, prompt)] = prompt
        if len(running) == at_once:
            for answer in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(answer), answer
    while running:
        for answer in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(answer), answer


def _reference(prompt: PromptLine) -> str:
    from honed.models.prompt_rows import row_reference

    return row_reference(prompt.row)


def _is_of_every_prompt(error: Exception) -> bool:
    """Whether a failure is none of the prompt's own: who asks, how it is asked, or what the run cannot do at all."""
    code, field = getattr(error, "code", ""), getattr(error, "field", "")
    if code == "INVALID_ARGUMENT":
        return field == "n" or field.startswith(("sampling.", "best_of."))
    return code in _OF_EVERY_PROMPT


def _summary(outcome: Outcome, compared: bool) -> str:
    parts = [f"{outcome.written} written", f"{outcome.there} there already", f"{outcome.failed} failed"]
    if compared:
        parts.insert(1, f"{outcome.comparisons} comparisons")
    if outcome.mean_score is not None:
        parts.append(f"mean score {outcome.mean_score:+.4f}")
    return ", ".join(parts) + ("; the same command asks again for what failed" if outcome.failed else "")
