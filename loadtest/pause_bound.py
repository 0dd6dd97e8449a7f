"""What a push of a model has to take at least, and the bound that its pause is held against.

The bound is 0.1 s + 1.5 times (one copy of the weights' bytes + one forward pass of the canaries),
both measured on the machine that serves, while nothing else runs, with as many threads as the
engine has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from honed.learner.loop.exporter import canary_texts
from honed.models.loader import load_language_model

_REPEATS = 5


@dataclass(frozen=True)
class PauseBound:
    """Sizes and times of one model; `weight_bytes` in bytes, the others in seconds."""

    weight_bytes: int
    copy_s: float
    forward_s: float

    @property
    def bound_s(self) -> float:
        """The longest that a pause should take."""
        return 0.1 + 1.5 * (self.copy_s + self.forward_s)


def measure_bound(model: Path, threads: int) -> PauseBound:
    """Measures both for the Hugging Face directory `model`. Takes three times its memory for a moment."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        copy_s = _copy(weight_bytes)
        policy = load_language_model(model, device=torch.device("cpu")).eval()
        texts = torch.tensor(canary_texts(policy.config.vocab_size))

        def forward() -> None:
            with torch.inference_mode():
                policy(texts, use_cache=False).logits.log_softmax(-1)

        return PauseBound(weight_bytes, copy_s, _median(forward))
    finally:
        torch.set_num_threads(before)


def _copy(nbytes: int) -> float:
    """Both sides stand in memory already."""
    source, target = (torch.ones(nbytes // 4) for _ in range(2))
    return _median(lambda: target.copy_(source))


def _median(work: Callable[[], object]) -> float:
    """Seconds of one call; the first warms up."""
    times = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
