"""`honed generate`: samples from the live policy."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from honed.cli import output
from honed.cli.connection import AddressOption, RunOption, TokenFileOption, open_peer

if TYPE_CHECKING:
    from honed._client.values import PromptContent
    from honed.client import Client, Delta, Sample, SamplingOptions


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: honed generate 'the film was' --n 4 --max-tokens 24 --seed 1, or with --best-of 8")(generate)


def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue; - reads it from stdin.")],
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many responses.")] = 1,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens. Unset: the server's default.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy. Unset: 1.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Nucleus sampling. Unset: all tokens.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a response; may be repeated.")] = None,
    best_of: Annotated[
        int | None, typer.Option("--best-of", min=1, help="Sample so many, and show the best by the run's reward.")
    ] = None,
    scorer: Annotated[str, typer.Option(help="Scorer that decides among them. Unset: the whole reward.")] = "",
    reference: Annotated[str, typer.Option(help="What scorers compare responses with, such as the right answer.")] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is what a user says; the model's chat template wraps it.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Show tokens as they are sampled.")] = False,
    json: output.JsonOption = False,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds to wait at most.")] = 60.0,
    run: RunOption = None,
    address: AddressOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Continue a prompt by the policy that serves now, and tell which version sampled it."""
    from honed.client import ChatMessage, Client

    text = sys.stdin.read() if prompt == "-" else prompt
    content: PromptContent = [ChatMessage(role="user", content=text)] if chat else text
    if stream and n > 1 and not json:
        raise typer.BadParameter("shows one response; leave out --n, or take --json", param_hint="--stream")
    if best_of is None and scorer:
        raise typer.BadParameter("chooses among candidates: say how many by --best-of", param_hint="--scorer")
    if stream and best_of is not None:
        raise typer.BadParameter(
            "the best is known when all candidates have ended: leave one of the two out", param_hint="--stream"
        )
    if best_of is not None and n > best_of:
        raise typer.BadParameter(f"{n} responses cannot be chosen among {best_of}", param_hint="--n")
    asked: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
    }
    options: SamplingOptions = {key: value for key, value in asked.items() if value is not None}  # type: ignore[assignment]
    with Client.over(open_peer("generation", run, address, token_file), timeout=timeout) as client:
        if stream:
            _stream(client, content, n, json, options)
            return
        samples = client.generate(content, n=n, logprobs=json, best_of=best_of, scorer=scorer, reference=reference, **options)
    for sample in samples:
        if json:
            output.show_json(as_json(sample))
            continue
        typer.echo(output.printable(sample.text))
        output.note(_summary(sample))


def as_json(value: Sample | Delta) -> dict[str, Any]:
    """A sample or a delta as an object for programs."""
    names = ("index", "text", "token_ids", "logprobs", "finish_reason")
    spans = [{"version": str(s.version), "run": s.version.run, "start": s.start, "end": s.end} for s in value.versions]
    worth: dict[str, Any] = {}
    if (reward := getattr(value, "reward", None)) is not None:
        worth = {"reward": reward, "scores": [asdict(score) for score in getattr(value, "scores", ())]}
    return {**{name: getattr(value, name) for name in names}, "versions": spans, **worth}


def _stream(client: Client, content: PromptContent, n: int, json: bool, options: SamplingOptions) -> None:
    with client.stream(content, n=n, logprobs=json, **options) as deltas:
        for delta in deltas:
            if json:
                output.show_json(as_json(delta))
            else:
                typer.echo(output.printable(delta.text), nl=False)
        if not json:
            typer.echo()
            for sample in deltas.samples:
                output.note(_summary(sample))


def _summary(sample: Sample) -> str:
    versions = ", ".join(f"{s.version} (tokens {s.start} to {s.end})" for s in sample.versions)
    if sample.version is not None:
        versions = str(sample.version)
    told = f"  version {versions or 'unknown'}, {len(sample.token_ids)} tokens, ended by {sample.finish_reason or 'nothing'}"
    if sample.reward is None:
        return told
    scores = ", ".join(f"{score.scorer} {score.value:+.4f}" for score in sample.scores)
    return f"{told}; candidate {sample.index}, reward {sample.reward:+.4f} ({scores})"
