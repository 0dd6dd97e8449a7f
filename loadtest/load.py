"""Open-loop load on Generate or Score: `python -m loadtest.load generate|score`, on a run or on an address.

Requests arrive as a Poisson process, whatever the server does: one that falls behind meets a growing crowd, as it would in
life. Latencies count from the scheduled arrival. Each call has a deadline, so the test ends at most that long after its last
arrival. Generation is streamed, for the time to the first token and between tokens to be seen.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from honed._client.endpoints import Endpoints
from honed.kit.channel import connect
from honed.kit.tokens import read_token
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc, reward_pb2, reward_pb2_grpc
from loadtest import report
from loadtest.open_loop import Answer, run_open_loop
from loadtest.stats import Objectives, Outcome, Summary, poisson_arrivals, summarise
from loadtest.work import parse_range, random_text

CONNECT_TIMEOUT_S = 10.0

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Run = Annotated[Path | None, typer.Option("--run", help="Directory of a run that is up: address and token come from it.")]
Address = Annotated[str | None, typer.Option("--address", help="host:port of the service, in place of a run.")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="Bearer token for --address. Unset: $HONED_TOKEN.")]
Rate = Annotated[float, typer.Option("--rate", help="Mean arrivals a second.")]
Seconds = Annotated[float, typer.Option("--seconds", help="How long requests arrive.")]
Deadline = Annotated[float, typer.Option("--deadline", help="Seconds that a call may take.")]
Seed = Annotated[int, typer.Option("--seed", help="Of arrivals and prompts.")]
TtftSlo = Annotated[float | None, typer.Option("--ttft-slo", help="ms to the first token within which a request is good.")]
E2eSlo = Annotated[float | None, typer.Option("--e2e-slo", help="ms to the end within which a request is good.")]


@dataclass(frozen=True)
class Load:
    """How much of what, for how long.

    Attributes:
        name: What is called.
        unit: What the answers hold.
        rate: Mean arrivals a second.
        seconds: How long requests arrive.
        seed: Of the arrivals.
        objectives: When a request is good.
    """

    name: str
    unit: str
    rate: float
    seconds: float
    seed: int
    objectives: Objectives


@app.command()
def generate(
    run: Run = None,
    address: Address = None,
    token_file: TokenFile = None,
    rate: Rate = 10.0,
    seconds: Seconds = 20.0,
    deadline: Deadline = 60.0,
    seed: Seed = 1,
    tokens: Annotated[str, typer.Option("--tokens", help="Tokens to sample, a range.")] = "24-64",
    words: Annotated[str, typer.Option("--words", help="Words of a prompt, a range.")] = "4-12",
    prompts: Annotated[Path | None, typer.Option("--prompts", help="JSON lines with `text`, in place of random words.")] = None,
    fixed_length: Annotated[bool, typer.Option(help="Sample past the end of text, whatever the policy says.")] = True,
    ttft_slo: TtftSlo = None,
    e2e_slo: E2eSlo = None,
) -> None:
    """Load on StreamGenerate; exits 1 if nothing succeeded."""
    rng = random.Random(seed)
    fewest, most = parse_range(tokens)
    short, long = parse_range(words)
    made = (random_text(rng, rng.randint(short, long)) for _ in itertools.count())
    texts = made if prompts is None else itertools.cycle(_texts(prompts))
    load = Load("StreamGenerate", "tokens", rate, seconds, seed, _objectives(ttft_slo, e2e_slo))

    def make(channel: grpc.aio.Channel) -> Callable[[int], Answer]:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)

        async def call(number: int) -> Answer:
            request = generation_pb2.StreamGenerateRequest(
                prompt=generation_pb2.Prompt(text=next(texts)),
                sampling=common_pb2.SamplingParams(
                    max_tokens=rng.randint(fewest, most), seed=seed + number, fixed_length=fixed_length
                ),
            )
            async for message in stub.StreamGenerate(request, timeout=deadline):
                yield len(message.delta.token_ids)

        return call

    _finish(load, asyncio.run(_run(load, _open("generation", run, address, token_file), make)))


@app.command()
def score(
    run: Run = None,
    address: Address = None,
    token_file: TokenFile = None,
    rate: Rate = 10.0,
    seconds: Seconds = 20.0,
    deadline: Deadline = 60.0,
    seed: Seed = 1,
    items: Annotated[int, typer.Option("--items", min=1, help="Responses of one call.")] = 8,
    words: Annotated[str, typer.Option("--words", help="Words of a response, a range.")] = "8-24",
    e2e_slo: E2eSlo = None,
) -> None:
    """Load on Score; exits 1 if nothing succeeded."""
    rng = random.Random(seed)
    fewest, most = parse_range(words)
    load = Load("Score", "items", rate, seconds, seed, _objectives(None, e2e_slo))

    def item(number: int) -> reward_pb2.ScoreItem:
        prompt = generation_pb2.Prompt(text=random_text(rng, 6))
        return reward_pb2.ScoreItem(id=str(number), prompt=prompt, text=random_text(rng, rng.randint(fewest, most)))

    def make(channel: grpc.aio.Channel) -> Callable[[int], Answer]:
        stub = reward_pb2_grpc.RewardServiceStub(channel)

        async def call(_: int) -> Answer:
            answer = await stub.Score(reward_pb2.ScoreRequest(items=[item(i) for i in range(items)]), timeout=deadline)
            yield len(answer.results)

        return call

    _finish(load, asyncio.run(_run(load, _open("reward", run, address, token_file), make)))


async def _run(
    load: Load, open_channel: Callable[[], grpc.aio.Channel], make: Callable[[grpc.aio.Channel], Callable[[int], Answer]]
) -> list[Outcome]:
    arrivals = list(poisson_arrivals(load.rate, load.seconds, random.Random(load.seed)))
    counts: dict[str, Any] = {"sent": 0, "failed": 0}
    async with open_channel() as channel:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await channel.channel_ready()
        except TimeoutError as error:
            raise ValueError(f"nothing answered there within {CONNECT_TIMEOUT_S:g} s: is the service up?") from error
        with report.progress("sent", "failed") as bar:
            task = bar.add_task(load.name, total=len(arrivals), **counts)

            def sent() -> None:
                counts["sent"] += 1
                bar.update(task, **counts)

            def done(outcome: Outcome) -> None:
                counts["failed"] += not outcome.ok
                bar.update(task, advance=1, **counts)

            return await run_open_loop(arrivals, make(channel), on_sent=sent, on_done=done)


def _finish(load: Load, outcomes: list[Outcome]) -> None:
    summary = summarise(outcomes, load.objectives, load.seconds)
    latencies = {"first token": summary.ttft, "between tokens": summary.inter_token} if load.unit == "tokens" else {}
    title = f"{load.name}, {load.rate:g}/s for {load.seconds:g} s"
    report.show(
        report.latency_table(title, {**latencies, "end to end": summary.e2e, "sent late by": summary.lag}),
        report.figures_table("", ("", ""), _figures(load, summary)),
    )
    for outcome in {outcome.code: outcome for outcome in outcomes if not outcome.ok}.values():
        typer.echo(f"{outcome.code}, for example: {outcome.reason}", err=True)
    asked = {"method": load.name, "rate": load.rate, "seed": load.seed, "objectives_s": asdict(load.objectives)}
    report.finish({**asked, **_json(summary)})
    if not summary.succeeded:
        raise typer.Exit(1)


def _figures(load: Load, summary: Summary) -> list[tuple[str, str]]:
    errors = ", ".join(f"{code} {count}" for code, count in summary.errors.items())
    return [
        ("requests", f"{summary.requests:,}"),
        ("succeeded", f"{summary.succeeded:,}"),
        ("errors", errors or "none"),
        ("offered, requests/s", f"{summary.offered_rate:,.2f}"),
        ("achieved, requests/s", f"{summary.achieved_rate:,.2f}"),
        ("goodput, requests/s", f"{summary.goodput:,.2f}"),
        (f"{load.unit}/s", f"{summary.unit_rate:,.1f}"),
        (f"goodput, {load.unit}/s", f"{summary.good_unit_rate:,.1f}"),
    ]


def _json(summary: Summary) -> dict[str, Any]:
    return {name: report.rounded(value) if isinstance(value, float) else value for name, value in asdict(summary).items()}


def _objectives(ttft_ms: float | None, e2e_ms: float | None) -> Objectives:
    return Objectives(None if ttft_ms is None else ttft_ms / 1e3, None if e2e_ms is None else e2e_ms / 1e3)


def _texts(path: Path) -> list[str]:
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{path} holds no prompts")
    return texts


def _open(service: str, run: Path | None, address: str | None, token_file: Path | None) -> Callable[[], grpc.aio.Channel]:
    """How to reach the service. The channel itself is opened later: it belongs to the event loop."""
    tls = None
    if address is None:
        if run is None:
            raise typer.BadParameter("name the service by --run DIR or --address host:port")
        endpoints = Endpoints.read(run)
        address, tls, token_file = endpoints.address(service), endpoints.tls, token_file or endpoints.token_file
    token = read_token(token_file) if token_file is not None else os.environ.get("HONED_TOKEN")
    target = address
    return lambda: connect(target, token, tls)


if __name__ == "__main__":
    report.run(lambda: app(prog_name="python -m loadtest.load"))
