"""The figures of the demo, each from its own source and none from the policy's own opinion of itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from honed.conductor.sampling import Continuation
from honed.demo.judge import RidgeJudge
from honed.models.loader import load_language_model
from honed.models.tokenizer import load_tokenizer
from honed.queue.stats import StageStats
from honed.report.measures import distinct_n
from honed.v1 import learner_pb2

PAUSE_BAR_MS = 100.0


@dataclass(frozen=True)
class Figures:
    """What `report.json` holds; see the README for each one's meaning."""

    rm_agreement: float
    judge_before: float
    judge_after: float
    kl_mean_nats: float
    distinct2_ratio: float
    versions_pushed: int
    push_pause_p95_ms: float
    requests_failed: int
    learner_busy: float
    generator_busy: float
    staleness_mean: float
    staleness_max: int
    rollouts_produced: int
    rollouts_trained: int
    rollouts_dropped: Mapping[str, int]
    seconds_total: float

    def missed(self) -> list[str]:
        """The bars that were missed, in words; empty when all is well."""
        gain = self.judge_after - self.judge_before
        accounted = self.rollouts_trained + sum(self.rollouts_dropped.values())
        bars = [
            (self.rm_agreement >= 0.72, f"the reward model agrees with {self.rm_agreement:.3f} of comparisons, under 0.72"),
            (gain >= 1.0, f"the judge's mean rating rose by {gain:.2f}, less than 1"),
            (self.kl_mean_nats <= 12.0, f"the policy is {self.kl_mean_nats:.1f} nats from its base, over 12"),
            (self.distinct2_ratio >= 0.5, f"distinct-2 fell to {self.distinct2_ratio:.2f} of the base's, under 0.5"),
            (self.versions_pushed >= 30, f"{self.versions_pushed} versions were pushed, fewer than 30"),
            (self.requests_failed == 0, f"{self.requests_failed} requests failed"),
            (
                accounted == self.rollouts_produced,
                f"{self.rollouts_produced} rollouts were produced and {accounted} are accounted for",
            ),
        ]
        return [text for met, text in bars if not met]

    def slow(self) -> str:
        """What was slower than its bar, in words; empty when nothing was. It says as much of the machine as of the run."""
        late = self.push_pause_p95_ms > PAUSE_BAR_MS
        return f"the p95 pause of a push is {self.push_pause_p95_ms:.0f} ms, over {PAUSE_BAR_MS:g}" if late else ""

    def as_json(self) -> dict[str, object]:
        """The figures by name."""
        return asdict(self)


@torch.no_grad()
def kl_to_base(directory: Path, samples: Sequence[Continuation], temperature: float) -> float:
    """Mean over responses of the sum over tokens of log p(policy) - log p(base), nats (k1), at the sampling temperature."""
    model = load_language_model(directory)
    total = 0.0
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_token_ids, *sample.token_ids]])
        start = len(sample.prompt_token_ids)
        logits = model(input_ids=ids).logits[0, start - 1 : -1].float() / temperature
        base = logits.log_softmax(-1).gather(1, ids[0, start:, None]).sum()
        total += float(np.sum(sample.logprobs, dtype=np.float64)) - float(base)
    return total / len(samples)


@torch.no_grad()
def perplexity(directory: Path, texts: Sequence[str]) -> float:
    """Of texts under a language model: exp of the mean `-log p` of their tokens, each text behind the token that begins one."""
    model, tokenizer = load_language_model(directory), load_tokenizer(directory)
    start = tokenizer.prefix or ((tokenizer.end,) if tokenizer.end is not None else ())
    longest = model.config.max_position_embeddings
    total, count = 0.0, 0
    for text in tokenizer.encode_all(texts):
        ids = torch.tensor([[*start, *text][:longest]])
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(ids[0]) - 1
    return math.exp(total / count)


def judged(judge: RidgeJudge, samples: Sequence[Continuation]) -> float:
    """The judge's mean rating of the continuations alone."""
    return judge.mean_rating([sample.text for sample in samples])


def distinct2_ratio(before: Sequence[Continuation], after: Sequence[Continuation]) -> float:
    """Distinct word pairs after, as a share of those before."""
    return distinct_n([s.text.split() for s in after]) / distinct_n([s.text.split() for s in before])


def dropped_rollouts(stages: Mapping[str, StageStats]) -> dict[str, int]:
    """Rollouts that were produced and did not train, by reason."""
    reasons: dict[str, int] = {}
    for stage in ("rollouts", "scored"):
        stats = stages[stage]
        for reason, count in {**stats.dropped, f"dead_{stage}": stats.dead, f"left_in_{stage}": stats.depth}.items():
            if count:
                reasons[reason] = reasons.get(reason, 0) + count
    return reasons


def trained_rollouts(updates: Sequence[learner_pb2.StepMetrics]) -> int:
    """Rollouts that trained.

    Raises:
        RuntimeError: one trained twice.
    """
    ids = [rollout for update in updates for rollout in update.rollout_ids]
    if len(ids) != len(set(ids)):
        raise RuntimeError(f"{len(ids) - len(set(ids))} rollouts trained twice")
    return len(ids)


def busy_share(updates: Sequence[learner_pb2.StepMetrics], start: float, end: float) -> float:
    """The share of the time from `start` to `end`, seconds since 1970, that updates took.

    The learner also keeps the updates of earlier starts of the run. Of every update only the part
    between the two times counts.
    """
    busy = 0.0
    for update in updates:
        ended = update.ended_at.ToNanoseconds() / 1e9
        busy += max(0.0, min(ended, end) - max(ended - update.values["seconds"], start))
    return busy / (end - start) if end > start else 0.0
