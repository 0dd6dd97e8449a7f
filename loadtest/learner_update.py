"""How much of the machine a PPO update uses: its tokens/s against bare passes of the same model, as a ratio.

Method. One random model of the demo's shape, `--episodes` episodes of 8 prompt and 24 response tokens; with `--ragged`, of 1 to
24. The same process, the same threads, the same budget of tokens of a pass, in turns:

* bare: for each epoch a forward and backward pass of the Hugging Face model over the batch, sorted by length and padded on
  the right, with plain autograd: hidden states, logits at the action tokens alone, log-softmax, the sum of the chosen
  log-probabilities. No optimizer, no value head, no reference, no bookkeeping. That is the limit that `ratio` is against.
* update: `Trainer.update`: reads the batch with policy and reference, estimates advantages, makes the same epochs of passes
  with the clipped losses and the value head, and moves the weights.

Response tokens are counted once an epoch on both sides. `ratio_to_needed` is against a bare side that also makes the two
forward passes, by policy and reference, that the algorithm needs.

With one compute thread on a CPU a turn is timed by the processor time of this process, which other load on the machine changes
less than the clock; with more threads, or a GPU, by the clock.
"""

from __future__ import annotations

import cProfile
import pstats
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.kit.memory import keep_freed_memory
from honed.learner.build import build_trainer, train_settings
from honed.learner.data.episode import Episode, TokenSpan
from honed.learner.settings import LearnerSettings
from honed.models.attention import Precision, use_float32_attention
from honed.models.loader import load_language_model
from loadtest import report
from loadtest.material import make_model
from loadtest.scratch import scratch_directory
from loadtest.work import PROMPT_TOKENS

_PROFILE_LINES = 40


@dataclass(frozen=True)
class Turn:
    """Seconds of the update, of the bare passes forward and backward, and of the two bare reads."""

    update: float
    passes: float
    reads: float


def make_episodes(count: int, tokens: int, vocabulary: int, seed: int, *, ragged: bool = False) -> list[Episode]:
    """Random episodes with plausible log-probabilities and rewards, all with so many tokens, or `ragged` with 1 to so many."""
    rng = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, vocabulary) for _ in range(length))

    return [
        Episode(
            rollout_id=f"{number}/0",
            entry_id=f"{number}-0",
            prompt=ids(PROMPT_TOKENS),
            response=ids(length),
            logprobs=tuple(rng.uniform(-9.0, -6.0) for _ in range(length)),
            spans=(TokenSpan(VersionId(1, 0), 0, length),),
            reward=rng.gauss(0.0, 1.0),
        )
        for number in range(count)
        for length in (rng.randint(1, tokens) if ragged else tokens,)
    ]


@dataclass(frozen=True)
class Padded:
    """Sequences as rows padded on the right, which causal attention reads without a mask.

    Attributes:
        tokens: `[b, L]`.
        states: Where in flattened `tokens` the state stands that predicts each response token, `[N]`.
        targets: The response tokens, `[N]`.
    """

    tokens: torch.Tensor
    states: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, episodes: Sequence[Episode], device: torch.device) -> Padded:
        """One batch."""
        read = [(*episode.prompt, *episode.response[:-1]) for episode in episodes]
        longest = max(map(len, read))
        tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in read])
        ends = [row * longest + len(ids) for row, ids in enumerate(read)]
        states = [at for end, e in zip(ends, episodes, strict=True) for at in range(end - len(e.response), end)]
        targets = torch.tensor([token for episode in episodes for token in episode.response])
        return cls(tokens.to(device), torch.tensor(states).to(device), targets.to(device))


def padded_batches(episodes: Sequence[Episode], budget: int, device: torch.device) -> list[Padded]:
    """Sorted by length and cut where padded rows would pass the budget of tokens."""
    batches: list[list[Episode]] = []
    for episode in sorted(episodes, key=lambda each: len(each.prompt) + len(each.response)):
        length = len(episode.prompt) + len(episode.response) - 1
        if not batches or (len(batches[-1]) + 1) * length > budget:
            batches.append([])
        batches[-1].append(episode)
    return [Padded.of(batch, device) for batch in batches]


class Bare:
    """The passes without the algorithm, in the same precision."""

    def __init__(self, model: Any, batches: Sequence[Padded], epochs: int, precision: Precision) -> None:
        """`model` is one of its own: the trainer's attends in packed rows."""
        self._model = model
        self._batches = batches
        self._epochs = epochs
        self._low = precision == "bfloat16"
        if self._low and model.device.type == "cpu":
            use_float32_attention(model)  # as the trainer's does: without it the bare side would be the slower one

    def passes(self) -> None:
        """Forward and backward, epoch by epoch."""
        for _ in range(self._epochs):
            self._model.zero_grad(set_to_none=True)
            for batch in self._batches:
                torch.autograd.backward(self._logprobs(batch).sum())

    @torch.no_grad()
    def reads(self) -> None:
        """Forward twice: what the policy and the reference say of the batch."""
        for _ in range(2):
            for batch in self._batches:
                self._logprobs(batch)

    def _logprobs(self, batch: Padded) -> torch.Tensor:
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=self._low):
            hidden = self._model.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
            logits = self._model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, batch.states))
        chosen: torch.Tensor = logits.float().log_softmax(-1).gather(1, batch.targets.unsqueeze(1))
        return chosen


def measure(settings: RunSettings, model: Path, episodes: Sequence[Episode], rounds: int, profile: Path | None) -> list[Turn]:
    """Turns of update and bare passes, after a warm-up of each."""
    trainer = build_trainer(settings, model)
    mine = settings.learner
    batches = padded_batches(episodes, mine.microbatch_tokens, trainer.model.device)
    bare = Bare(load_language_model(model, device=trainer.model.device), batches, trainer.settings.epochs, mine.precision)
    clock = time.process_time if mine.threads == 1 and trainer.model.device.type == "cpu" else time.perf_counter

    def update() -> None:
        trainer.update(episodes, version=VersionId(1, trainer.step))

    turns = []
    with report.progress() as bar:
        task = bar.add_task("turns", total=rounds)
        for number in range(rounds + 1):
            turn = Turn(passes=timed(bare.passes, clock), reads=timed(bare.reads, clock), update=timed(update, clock))
            if number:
                turns.append(turn)
                bar.advance(task)
    if profile is not None:
        _profile(update, profile)
    return turns


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a clock, those of a GPU included."""
    _synchronise()
    start = clock()
    work()
    _synchronise()
    return clock() - start


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _profile(update: Callable[[], None], file: Path) -> None:
    """One more update under cProfile and under torch's profiler, each on its own: they would time each other."""
    watch = cProfile.Profile()
    watch.runcall(update)
    watch.dump_stats(file)
    pstats.Stats(watch, stream=sys.stderr).sort_stats("tottime").print_stats(_PROFILE_LINES)
    with torch.profiler.profile() as operations:
        update()
    print(operations.key_averages().table(sort_by="self_cpu_time_total", row_limit=_PROFILE_LINES), file=sys.stderr)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Turns of update and bare passes.")] = 5,
    episodes: Annotated[int, typer.Option(min=2, help="Episodes of an update.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response.")] = 24,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads on a CPU.")] = 1,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    model: Annotated[Path | None, typer.Option(help="Hugging Face model directory, in place of a tiny random model.")] = None,
    ragged: Annotated[bool, typer.Option(help="Responses of 1 to --tokens tokens.")] = False,
    profile: Annotated[Path | None, typer.Option(help="Profile one more update; the raw profile goes to this path.")] = None,
) -> None:
    """Compares an update with bare passes of its model, and prints the ratio."""
    keep_freed_memory()  # as a learner does, for both sides
    learner = LearnerSettings.model_validate({"threads": threads, "precision": precision, "batch": episodes})
    with scratch_directory() as directory:
        chosen = model or directory / "model"
        if model is None:
            make_model(chosen)
        # No longer than the episodes: the learner asks that the model can read what the generator may sample.
        longest = {"max_model_tokens": PROMPT_TOKENS + tokens, "max_prompt_tokens": PROMPT_TOKENS}
        settings = RunSettings.model_validate(
            {
                "run": "loadtest",
                "directory": directory,
                "learner": learner,
                "generation": {**longest, "max_tokens": tokens, "default_max_tokens": tokens},
                "conductor": {"response_tokens": tokens},
            }
        )
        material = make_episodes(episodes, tokens, _vocabulary(chosen), seed=1, ragged=ragged)
        turns = measure(settings, chosen, material, rounds, profile)
    epochs = train_settings(learner).epochs
    count = sum(len(episode.response) for episode in material) * epochs
    pairs = [(count / turn.passes, count / turn.update) for turn in turns]
    needed = [(count / (turn.passes + turn.reads), count / turn.update) for turn in turns]
    title = f"{episodes} episodes of {tokens} tokens, {epochs} epochs"
    report.show(report.pairs_table(title, "bare passes", "update", "tokens/s", pairs))
    report.finish(
        {
            "ratio": report.rounded(report.median_ratio(pairs)),
            "ratios": [report.rounded(b / a) for a, b in pairs],
            "ratio_to_needed": report.rounded(report.median_ratio(needed)),
            "update_tokens_per_second": report.rounded(statistics.median(b for _, b in pairs)),
            "bare_tokens_per_second": report.rounded(statistics.median(a for a, _ in pairs)),
            "update_seconds": report.rounded(statistics.median(turn.update for turn in turns)),
            "episodes": episodes,
            "tokens": tokens,
            "ragged": ragged,
            "epochs": epochs,
            "threads": threads,
            "precision": precision,
        }
    )


def _vocabulary(model: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model, local_files_only=True).vocab_size)


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
