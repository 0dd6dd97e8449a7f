"""What reading a prompt once for its responses saves: seconds of passes, as a ratio to reading it with each response.

Method. One random model of the demo's shape, or one that is named; `--groups` prompts, `--group` responses to each, of one to
`--tokens` tokens. The same process, threads and budget of tokens of a pass; passes of both kinds in turns, after a warm-up of
each. Both give the same gradients, which is checked. `tokens_ratio` is what there is to gain.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from honed.learner.data.batches import MicroBatch, micro_batches
from honed.learner.data.episode import Episode
from honed.learner.models.policy import PolicyModel
from honed.models.loader import load_language_model
from loadtest import report
from loadtest.learner_update import make_episodes, timed
from loadtest.material import LONGEST, make_model
from loadtest.scratch import scratch_directory

_CLOSE = 0.99


def make_groups(groups: int, size: int, prompt: int, tokens: int, vocabulary: int) -> list[Episode]:
    """Ragged responses, `size` to each prompt."""
    source = random.Random(1)
    episodes = make_episodes(groups * size, tokens, vocabulary, seed=1, ragged=True)
    prompts = [tuple(source.randrange(1, vocabulary) for _ in range(prompt)) for _ in range(groups)]
    return [replace(episode, prompt=prompts[number // size]) for number, episode in enumerate(episodes)]


def passes(policy: PolicyModel, packed: Sequence[MicroBatch]) -> None:
    """Forward and backward of a batch."""
    policy.zero_grad(set_to_none=True)
    for micro in packed:
        torch.autograd.backward(policy.evaluate(micro).logprobs.sum())


def gradient(policy: PolicyModel) -> torch.Tensor:
    """All of it."""
    return torch.cat([p.grad.flatten() for p in policy.language_model.parameters() if p.grad is not None])


def main(
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a response.")] = 128,
    groups: Annotated[int, typer.Option(min=1, help="Prompts.")] = 8,
    group: Annotated[int, typer.Option(min=2, help="Responses to each.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of both kinds of pass.")] = 7,
    microbatch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one pass.")] = 4096,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads on a CPU.")] = 1,
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the passes.")] = "float32",
    model: Annotated[Path | None, typer.Option(help="Hugging Face model directory, in place of a tiny random model.")] = None,
) -> None:
    """Compares passes that share prompts with passes that do not, and prints the ratios."""
    if model is None and prompt + tokens > LONGEST:
        raise ValueError(
            f"--prompt and --tokens are {prompt + tokens} together, and the tiny model reads {LONGEST}: name a model"
        )
    torch.set_num_threads(threads)
    with scratch_directory() as directory:
        if model is None:
            make_model(directory / "model")
        policy = PolicyModel(load_language_model(model or directory / "model"), precision=precision)
    if not policy.packed:
        raise ValueError(f"{type(policy.language_model).__name__} attends in a way in which no row can be packed")
    episodes = make_groups(groups, group, prompt, tokens, policy.vocabulary_size)
    alone, shared = (
        micro_batches(episodes, range(len(episodes)), max_tokens=microbatch_tokens, width=tokens, share_prompts=share)
        for share in (False, True)
    )
    pairs, gradients = [], []
    for number in range(rounds + 1):
        seconds = []
        for packed in (alone, shared):
            seconds.append(timed(lambda packed=packed: passes(policy, packed)))  # type: ignore[misc]
            if not number:
                gradients.append(gradient(policy))
        if number:
            pairs.append((seconds[0], seconds[1]))
    same = float(torch.nn.functional.cosine_similarity(*gradients, dim=0))
    if same < _CLOSE:
        raise ValueError(f"the gradients differ: their cosine is {same:.4f}")
    report.show(report.pairs_table(f"{prompt} and up to {tokens} tokens", "with each", "once", "seconds", pairs))
    read = [sum(len(micro.tokens) for micro in packed) for packed in (alone, shared)]
    report.finish(
        {
            "time_ratio": report.rounded(statistics.median(b / a for a, b in pairs)),
            "tokens_ratio": report.rounded(read[1] / read[0]),
            "gradient_cosine": report.rounded(same),
            "prompt": prompt,
            "tokens": tokens,
            "groups": groups,
            "group": group,
            "precision": precision,
            "threads": threads,
        }
    )


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
