"""What gRPC and honed cost: served tokens/s against a bare `AsyncLLM`, as a ratio, in one run.

Method. One server process (`loadtest.serving`) runs honed's server, interceptor with token check and metrics, generation
service and vLLM engine, as `honed serve generation` does. Both sides use that one engine, one after the other, never at once:

* bare: inside the server process, on its event loop, `AsyncLLM.generate` of the engine's own `AsyncLLM` object. Its prompt form
  and `SamplingParams` (log-probabilities, detokenisation, output kind) are copied from what honed's service sent to `AsyncLLM`
  for a real request, and made before the clock starts. Nothing is done with what comes back but to count its tokens.
* served: this process calls unary Generate over gRPC on loopback, with a bearer token, and decodes each answer. On a small
  machine this client takes processor time from the server: the ratio has it to bear, and the figures tell how much it was.

Each side keeps `--concurrency` requests in flight until `--requests` are done: the same prompts (8 random tokens, too short for
the prefix cache) and the same fixed numbers of tokens, past any end of text. That both sample exactly that count is checked.
Rounds alternate: bare, served, bare, served ... A pair's ratio is served / bare; the result is the median over the pairs.
`--streaming` measures StreamGenerate against `AsyncLLM.generate` with deltas as well: there each token is a message of its own.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc
from loadtest import report
from loadtest.closed_loop import Round, run_closed_loop
from loadtest.generator import Generator, started
from loadtest.scratch import scratch_directory
from loadtest.serving import Setup
from loadtest.work import Plan, Work, parse_range

CALL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Options:
    """How to measure; see the command."""

    pairs: int
    requests: int
    concurrency: int
    tokens: tuple[int, int]
    logprobs: bool
    seed: int


@dataclass(frozen=True)
class Side:
    """One round with the processor seconds of both processes."""

    tokens_per_second: float
    seconds: float
    server_cpu_seconds: float
    client_cpu_seconds: float


Pairs = list[tuple[Side, Side]]
"""Rounds (bare, served)."""


class Comparison:
    """Runs rounds of either side on one generator."""

    def __init__(
        self, generator: Generator, stub: generation_pb2_grpc.GenerationServiceAsyncStub, options: Options, *, stream: bool
    ) -> None:
        """`stub` calls the generator."""
        self._generator = generator
        self._stub = stub
        self._options = options
        self._stream = stream

    async def run(self, bar: Any, task: Any) -> Pairs:
        """Warms both sides up and measures the pairs."""
        options = self._options
        await self._generator.command("copy", stream=self._stream, logprobs=options.logprobs)
        warm_up = self._plan(0, 2 * options.concurrency)
        await self.bare(warm_up)
        await self.served(warm_up)
        pairs = []
        for number in range(1, options.pairs + 1):
            plan = self._plan(number, options.requests)
            pairs.append((await self.bare(plan), await self.served(plan)))
            bar.advance(task)
        return pairs

    async def bare(self, plan: Plan) -> Side:
        """The engine alone."""
        answer = await self._generator.command("bare", concurrency=self._options.concurrency, plan=plan.to_json())
        done = Round(**answer)
        _check(done, plan)
        return Side(done.tokens_per_second, done.seconds, done.cpu_seconds, 0.0)

    async def served(self, plan: Plan) -> Side:
        """The same through gRPC."""
        work = plan.work()
        before = await self._generator.command("cpu")
        done = await run_closed_loop(len(work), self._options.concurrency, lambda number: self._call(work[number]))
        after = await self._generator.command("cpu")
        _check(done, plan)
        return Side(done.tokens_per_second, done.seconds, after["cpu_seconds"] - before["cpu_seconds"], done.cpu_seconds)

    async def _call(self, work: Work) -> int:
        prompt = generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=work.prompt))
        sampling = common_pb2.SamplingParams(max_tokens=work.tokens, fixed_length=True)
        logprobs = self._options.logprobs
        if self._stream:
            streamed = generation_pb2.StreamGenerateRequest(prompt=prompt, sampling=sampling, logprobs=logprobs)
            tokens = 0
            async for message in self._stub.StreamGenerate(streamed, timeout=CALL_TIMEOUT_S):
                tokens += len(message.delta.token_ids)
            return tokens
        whole = generation_pb2.GenerateRequest(prompt=prompt, sampling=sampling, logprobs=logprobs)
        answer = await self._stub.Generate(whole, timeout=CALL_TIMEOUT_S)
        return len(answer.samples[0].token_ids)

    def _plan(self, number: int, requests: int) -> Plan:
        shortest, longest = self._options.tokens
        return Plan(self._options.seed * 1000 + number, requests, shortest, longest, self._generator.vocabulary)


async def measure(setup: Setup, options: Options, *, streaming: bool, profile: Path | None) -> dict[str, Pairs]:
    """Starts a generator and compares both sides; by kind of call, `unary` and, if asked for, `streaming`."""
    async with started(setup) as generator, generator.channel() as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        kinds = {"unary": False, **({"streaming": True} if streaming else {})}
        pairs = {}
        with report.progress() as bar:
            for kind, stream in kinds.items():
                task = bar.add_task(f"{kind} pairs", total=options.pairs)
                comparison = Comparison(generator, stub, options, stream=stream)
                pairs[kind] = await comparison.run(bar, task)
                if profile is not None:
                    plan = Plan(options.seed, options.requests, *options.tokens, generator.vocabulary)
                    await _profile(generator, comparison, plan, profile.with_suffix(f".{kind}.prof"))
    return pairs


async def _profile(generator: Generator, comparison: Comparison, plan: Plan, file: Path) -> None:
    """One more served round under cProfile, after the figures: it slows the server down."""
    await generator.command("profile", on=True)
    side = await comparison.served(plan)
    hot = (await generator.command("profile", on=False, file=str(file)))["hot"]
    rows = [(f["where"], f"{f['own_s']:.3f}", f"{f['total_s']:.3f}", f["calls"]) for f in hot]
    title = f"{file}: the server's event loop for {side.seconds:.1f} s"
    report.show(report.figures_table(title, ("function", "own s", "total s", "calls"), rows))


def figures(pairs: Pairs) -> dict[str, Any]:
    """The figures of one kind of call."""
    rates = [(bare.tokens_per_second, served.tokens_per_second) for bare, served in pairs]
    bare, served = zip(*pairs, strict=True)
    return {
        "ratio": report.rounded(report.median_ratio(rates)),
        "ratios": [report.rounded(b / a) for a, b in rates],
        "served_tokens_per_second": report.rounded(statistics.median(side.tokens_per_second for side in served)),
        "bare_tokens_per_second": report.rounded(statistics.median(side.tokens_per_second for side in bare)),
        "served_server_cpu_share": report.rounded(statistics.median(s.server_cpu_seconds / s.seconds for s in served)),
        "bare_server_cpu_share": report.rounded(statistics.median(s.server_cpu_seconds / s.seconds for s in bare)),
        "client_cpu_share": report.rounded(statistics.median(s.client_cpu_seconds / s.seconds for s in served)),
    }


def _check(done: Round, plan: Plan) -> None:
    expected = sum(work.tokens for work in plan.work())
    if done.tokens != expected:
        raise RuntimeError(f"{done.tokens} tokens came, {expected} were asked for: the two sides would not compare")


def main(
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of rounds (bare, served).")] = 5,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a round.")] = 512,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
    tokens: Annotated[str, typer.Option(help="Tokens that a request samples, a range.")] = "64-128",
    logprobs: Annotated[bool, typer.Option(help="Ask for the log-probability of each token, on both sides.")] = False,
    streaming: Annotated[bool, typer.Option(help="Compare streams too.")] = False,
    model: Annotated[Path | None, typer.Option(help="Hugging Face model directory, in place of a tiny random model.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of the engine on a CPU.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of prompts and lengths.")] = 1,
    profile: Annotated[Path | None, typer.Option(help="Profile one more served round; raw profiles go beside it.")] = None,
) -> None:
    """Compares served and bare tokens/s and prints the ratio."""
    options = Options(pairs, requests, concurrency, parse_range(tokens), logprobs, seed)
    with scratch_directory() as directory:
        setup = Setup(str(directory), str(model) if model else None, 1, concurrency, threads, dtype)
        measured = asyncio.run(measure(setup, options, streaming=streaming, profile=profile))
    for kind, sides in measured.items():
        rates = [(bare.tokens_per_second, served.tokens_per_second) for bare, served in sides]
        report.show(report.pairs_table(f"{kind}, {concurrency} in flight", "bare", "served", "tokens/s", rates))
    result = figures(measured["unary"])
    if "streaming" in measured:
        result["streaming"] = figures(measured["streaming"])
    asked = {"pairs": pairs, "requests": requests, "concurrency": concurrency, "tokens": tokens, "logprobs": logprobs}
    report.finish({**result, **asked, "python": sys.version.split()[0]})


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
