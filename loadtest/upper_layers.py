"""What training the upper layers alone saves: seconds and bytes of a PPO update against those of the whole model, as ratios.

Method. One random model of the demo's width, or one that is named. The same process, threads and episodes; updates of both
kinds in turns, after a warm-up of each. Bytes are counted and not sampled, so that two trainers can be told apart:

* weights: of policy, value head and reference, what they share once.
* training: gradients and the optimizer's moments.
* activations: what autograd keeps for the way back of the largest micro-batch, without weights.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.learner.build import build_trainer
from honed.learner.data.batches import micro_batches
from honed.learner.data.episode import Episode
from honed.models.facts import ModelFacts
from loadtest import report
from loadtest.learner_update import make_episodes, timed
from loadtest.material import make_model
from loadtest.scratch import scratch_directory
from loadtest.work import PROMPT_TOKENS


@dataclasses.dataclass(frozen=True)
class Bytes:
    """What an update holds in memory."""

    weights: int
    training: int
    activations: int

    @property
    def all(self) -> int:
        """The sum."""
        return self.weights + self.training + self.activations


def bytes_of(trainer: Any, episodes: Sequence[Episode]) -> Bytes:
    """Counts after an update, which has made gradients and moments."""
    reference = trainer.algorithm.reference
    weights = _storages([*trainer.model.parameters(), *reference.parameters()])
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    width = max(len(episode.response) for episode in episodes)
    budget = trainer.settings.microbatch_tokens
    packed = micro_batches(episodes, range(len(episodes)), max_tokens=budget, width=width)
    largest = max(packed, key=lambda batch: batch.tokens.numel()).to(trainer.model.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = trainer.model.evaluate(largest)  # held until its graph has been counted
        activations = _storages(kept, without=weights)
    del found
    return Bytes(sum(weights.values()), sum(_storages([*gradients, *moments]).values()), sum(activations.values()))


def _storages(tensors: Iterable[torch.Tensor], without: Iterable[int] = ()) -> dict[int, int]:
    """Bytes of what lies under tensors, by address: views share it."""
    left_out = set(without)
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return {address: size for address, size in found.items() if address not in left_out}


def main(
    unfrozen: Annotated[int, typer.Option(min=1, help="Layers that train.")] = 2,
    layers: Annotated[int, typer.Option(min=1, help="Of the random model.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of both kinds of update.")] = 5,
    episodes: Annotated[int, typer.Option(min=2, help="Episodes of an update.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response.")] = 24,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads on a CPU.")] = 1,
    model: Annotated[Path | None, typer.Option(help="Hugging Face model directory, in place of a tiny random model.")] = None,
) -> None:
    """Compares updates of the upper layers with updates of the whole model, and prints the ratios."""
    with scratch_directory() as directory:
        chosen = model or directory / "model"
        if model is None:
            make_model(chosen, layers=layers)
        facts = ModelFacts.read(chosen)
        material = make_episodes(episodes, tokens, facts.vocabulary_size or 0, seed=1)
        longest = {"max_model_tokens": PROMPT_TOKENS + tokens, "max_prompt_tokens": PROMPT_TOKENS}
        trainers = []
        for some in (None, unfrozen):
            learner = {"threads": threads, "batch": episodes, "unfrozen_layers": some}
            tree = {
                "run": "loadtest",
                "directory": directory,
                "learner": learner,
                "generation": {**longest, "max_tokens": tokens, "default_max_tokens": tokens},
                "conductor": {"response_tokens": tokens},
            }
            trainers.append(build_trainer(RunSettings.model_validate(tree), chosen))
        seconds: list[list[float]] = [[], []]
        for number in range(rounds + 1):
            for trainer, spent in zip(trainers, seconds, strict=True):
                taken = timed(lambda trainer=trainer: trainer.update(material, version=VersionId(1, trainer.step)))  # type: ignore[misc]
                if number:
                    spent.append(taken)
        whole, upper = (bytes_of(trainer, material) for trainer in trainers)
    pairs = list(zip(*seconds, strict=True))
    report.show(report.pairs_table(f"{unfrozen} of {facts.layers} layers", "whole", "upper", "seconds", pairs))
    report.finish(
        {
            "time_ratio": report.rounded(statistics.median(b / a for a, b in pairs)),
            "memory_ratio": report.rounded(upper.all / whole.all),
            "whole_mb": {name: report.rounded(size / 1e6) for name, size in dataclasses.asdict(whole).items()},
            "upper_mb": {name: report.rounded(size / 1e6) for name, size in dataclasses.asdict(upper).items()},
            "unfrozen": unfrozen,
            "layers": facts.layers,
            "episodes": episodes,
            "tokens": tokens,
            "threads": threads,
        }
    )


if __name__ == "__main__":
    report.run(lambda: typer.run(main))
