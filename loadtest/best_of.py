"""What best-of-n costs beside its samples: the latency of Generate with `best_of` against the same n samples, on one run.

Method. One call is in flight at a time, on a run that is up: first n samples, then the best of n candidates with the same
prompt, seed and fixed number of tokens, in turns. Both sample the same tokens, which is checked. A pair's ratio is
best of n / n samples; the result is the median over the pairs.
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Annotated

import typer

from honed.client import Client, Sample
from loadtest import report
from loadtest.work import random_text

WARM_UP = 3
PROMPT_WORDS = 6


def measure(client: Client, pairs: int, n: int, tokens: int, seed: int) -> list[tuple[float, float]]:
    """Seconds of each pair of calls: n samples, and the best of n.

    Raises:
        RuntimeError: The best is none of the samples.
    """
    words = random.Random(seed)
    measured: list[tuple[float, float]] = []
    with report.progress() as bar:
        task = bar.add_task("pairs", total=pairs)
        for number in range(pairs + WARM_UP):
            prompt = random_text(words, PROMPT_WORDS)

            def ask(best_of: int | None, prompt: str = prompt, own: int = seed + number * n) -> tuple[float, list[Sample]]:
                begun = time.perf_counter()
                count = n if best_of is None else 1
                samples = client.generate(prompt, n=count, best_of=best_of, max_tokens=tokens, fixed_length=True, seed=own)
                return time.perf_counter() - begun, samples

            plain, samples = ask(None)
            chosen, [best] = ask(n)
            if best.token_ids != samples[best.index].token_ids:
                raise RuntimeError(
                    f"the best of {n} is not the sample {best.index} of the same seed: both sides must sample the same"
                )
            if number >= WARM_UP:
                measured.append((plain, chosen))
                bar.advance(task)
    return measured


def main(
    run: Annotated[Path, typer.Option(help="Directory of a run that is up, with scorers.")] = Path("out/demo"),
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of calls.")] = 50,
    n: Annotated[int, typer.Option("--n", min=1, help="Samples of a call, and candidates.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each response.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts and of sampling.")] = 1,
) -> None:
    """Compares the latency of best-of-n with that of its samples alone, and prints the ratio."""
    with Client.from_run(run) as client:
        measured = measure(client, pairs, n, tokens, seed)
    milliseconds = [(plain * 1e3, chosen * 1e3) for plain, chosen in measured]
    report.show(report.pairs_table(f"n = {n}, {tokens} tokens each", "n samples", "best of n", "ms", milliseconds))
    plain, chosen = zip(*milliseconds, strict=True)
    report.finish(
        {
            "ratio": report.rounded(report.median_ratio(measured)),
            "best_of_ms": report.rounded(statistics.median(chosen)),
            "samples_ms": report.rounded(statistics.median(plain)),
            "pairs": pairs,
            "n": n,
            "tokens": tokens,
        }
    )


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
