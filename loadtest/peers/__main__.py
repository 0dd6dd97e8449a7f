"""honed beside TRL on one machine: episodes a second, and the score at equal time.

    make peers
    python -m loadtest.peers ppo            # TRL 1.12.0's PPO, the last one it had
    python -m loadtest.peers grpo           # GRPO of TRL's newest release that requirements/peers.lock names

Method. For each seed both sides train on the same task, one after the other, never at once: the same random model, prompts,
number and length of responses, passes over a batch, optimizer, learning rate and price of KL, and a reward that a rule gives.
The peer is one process that samples with transformers and trains, with `--threads` compute threads, by default one for each
core. It is set up as fast as it can be; with `--as-it-comes` it keeps TRL's own settings where the task says nothing: eight
responses in a pass, activations that are computed again for the gradient, and bfloat16. Ours is `honed
up` as a user starts it: vLLM, scorer, learner, conductor and Redis in processes of their own, a push of each version, and a
checkpoint at each tenth. Nobody else waits for its generator, so the push overlaps with the next update, and a small learner
has a core of its own (`--own-cores`); a larger one needs both cores of two.

Start-up counts on neither side: time begins with the end of a side's first update. The rate leaves out two more updates. The
score is the mean of the batches in the last tenth of `--seconds`. `ratio` is the median of the seeds' ratios of episodes/s.
`*_cpu_ms_per_episode` is the processor time of all processes of a side for each episode, which other load on the machine
changes little; `cpu_ratio` is the peer's over ours. Exit status 1: a bar was missed.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

import loadtest
from honed.kit.cores import granted_cores
from loadtest import report
from loadtest.peers import compare, ours
from loadtest.peers.task import PEER_BATCH, Task, make_model, make_prompts
from loadtest.scratch import scratch_directory

ROOT: Final = Path(loadtest.__file__).parents[1]
BARS: Final = {"ppo": 1.5, "grpo": 3.0}
_START_S = 180.0

Algorithm = Literal["ppo", "grpo"]
Shape = Literal["gpt2", "llama"]
Precision = Literal["float32", "bfloat16"]


def peer(environment: Path, task: Task, file: Path) -> compare.Training:
    """Runs the peer's trainer in a process of its own, in its own environment.

    Raises:
        ValueError: It failed, has not ended in time, or told nothing.
    """
    task.write(file)
    extra = [environment / "trl-ppo"] if task.algorithm == "ppo" else []
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(place) for place in (ROOT, *extra)),
        "OMP_NUM_THREADS": str(task.threads),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_DATASETS_CACHE": str(file.parent / "datasets"),
    }
    command = [str(environment / "bin" / "python"), "-m", f"loadtest.peers.trl_{task.algorithm}", str(file)]
    log = file.with_suffix(".log")
    with log.open("w") as errors:
        try:
            done = subprocess.run(
                command, env=variables, stdout=subprocess.PIPE, stderr=errors, timeout=_START_S + 2 * task.seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"the peer has not ended in time:\n{_tail(log)}") from None
    if done.returncode:
        raise ValueError(f"the peer ended with code {done.returncode}:\n{_tail(log)}")
    rows = [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith('{"at"')]
    if not rows:
        raise ValueError(f"the peer made no update:\n{_tail(log)}")
    first, last = ((row["at"], row["cpu"]) for row in (rows[0], rows[-1]))
    return compare.Training([compare.Update(row["at"], row["score"]) for row in rows], (first, last))


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def one_seed(root: Path, task: Task, environment: Path, engine: str) -> tuple[compare.Side, compare.Side]:
    """Both sides, the peer's first with every second seed."""
    root.mkdir()

    def theirs() -> compare.Side:
        return compare.measure(peer(environment, task, root / "task.json"), batch=task.batch, seconds=task.seconds)

    def mine() -> compare.Side:
        return compare.measure(asyncio.run(ours.train(root, task, engine)), batch=task.batch, seconds=task.seconds)

    if task.seed % 2:
        other = theirs()
        return other, mine()
    own = mine()
    return theirs(), own


def main(
    algorithm: Annotated[Algorithm, typer.Argument(help="What both sides learn with.")],
    model: Annotated[Shape, typer.Option(help="gpt2: 2 layers of 128; llama: 4 layers of 256.")] = "gpt2",
    tokens: Annotated[int | None, typer.Option(min=1, max=100, help="Of a response; 24 for gpt2, 64 for llama.")] = None,
    batch: Annotated[int, typer.Option(min=8, help="Responses of an update.")] = 64,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over a batch.")] = 4,
    seconds: Annotated[float, typer.Option(min=5, help="Training of each side with each seed.")] = 30.0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of the peer.")] = os.cpu_count() or 1,
    learning_rate: Annotated[float, typer.Option(min=0, help="AdamW's, of both.")] = 1e-3,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of both trainers' passes. Unset: float32; with --as-it-comes bfloat16, TRL's own."),
    ] = None,
    as_it_comes: Annotated[
        bool, typer.Option("--as-it-comes", help="TRL with its own settings, not the fastest ones.")
    ] = False,
    engine: Annotated[str, typer.Option(help="Ours: vllm, transformers or auto.")] = "auto",
    own_cores: Annotated[
        int | None,
        typer.Option(min=0, help="Ours: cores for the learner alone. Unset: one for gpt2 (of two or more), none for llama."),
    ] = None,
    environment: Annotated[Path, typer.Option(help="What `make peers` made.")] = ROOT / "build" / "peers",
) -> None:
    """Compares honed with TRL's trainer and prints both sides' figures."""
    if not (environment / ".installed").exists():
        raise ValueError(f"there is no environment {environment}: `make peers` makes it")
    if as_it_comes and batch % PEER_BATCH:
        raise ValueError(f"--batch must be a multiple of {PEER_BATCH}, which TRL reads at once; it is {batch}")
    with scratch_directory() as root:
        make_model(root / "model", model, seed=1)
        make_prompts(root / "prompts.jsonl", seed=1)
        task = Task(
            model=str(root / "model"),
            prompts=str(root / "prompts.jsonl"),
            algorithm=algorithm,
            tokens=tokens or {"gpt2": 24, "llama": 64}[model],
            batch=batch,
            group=8 if algorithm == "grpo" else 1,
            epochs=epochs,
            learning_rate=learning_rate,
            kl=0.01 if algorithm == "ppo" else 0.0,
            seconds=seconds,
            threads=threads,
            own_cores=int(model == "gpt2" and granted_cores() > 1) if own_cores is None else own_cores,
            as_it_comes=as_it_comes,
            precision=precision or ("bfloat16" if as_it_comes else "float32"),
            seed=0,
        )
        pairs = []
        for seed in range(1, seeds + 1):
            pair = one_seed(root / f"seed-{seed}", replace(task, seed=seed), environment, engine)
            pairs.append(pair)
            typer.echo(f"seed {seed}: theirs {pair[0]}, ours {pair[1]}", err=True)
    _finish(pairs, task, model)


def _finish(pairs: list[tuple[compare.Side, compare.Side]], task: Task, model: str) -> None:
    rates = [(theirs.episodes_per_second, own.episodes_per_second) for theirs, own in pairs]
    theirs, own = (compare.medians(sides) for sides in zip(*pairs, strict=True))
    ratio, bar = report.median_ratio(rates), BARS[task.algorithm]
    missed = []
    if ratio < bar:
        missed.append(f"{ratio:.3g} times the peer's episodes/s, the bar is {bar:g}")
    if own["score"] < theirs["score"]:
        missed.append(f"score {own['score']:.3g} at equal time, the peer has {theirs['score']:.3g}")
    if own["collapsed"]:
        missed.append(f"{own['collapsed']:g} seeds collapsed")
    report.show(report.pairs_table(f"{task.algorithm}, {model}, {task.tokens} tokens", "TRL", "honed", "episodes/s", rates))
    figures: dict[str, Any] = {
        "ratio": report.rounded(ratio),
        "ratios": [report.rounded(b / a) for a, b in rates],
        "cpu_ratio": report.rounded(statistics.median(a.cpu_ms_per_episode / b.cpu_ms_per_episode for a, b in pairs)),
        **{f"peer_{name}": report.rounded(value) for name, value in theirs.items()},
        **{f"honed_{name}": report.rounded(value) for name, value in own.items()},
        "score_difference": report.rounded(statistics.median(b.score - a.score for a, b in pairs)),
        "algorithm": task.algorithm,
        "model": model,
        "tokens": task.tokens,
        "batch": task.batch,
        "epochs": task.epochs,
        "seconds": task.seconds,
        "seeds": len(pairs),
        "threads": task.threads,
        "own_cores": task.own_cores,
        "as_it_comes": task.as_it_comes,
        "precision": task.precision,
        "missed": missed,
    }
    report.finish(figures)
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
