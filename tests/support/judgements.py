"""Judgements of every kind for tests."""

from __future__ import annotations

from honed.preference.content import Entry
from honed.v1 import common_pb2, preference_pb2

VERDICTS = {
    "pairwise": {"pairwise": preference_pb2.PairwiseJudgement(preferred=1, other=0, strength=2)},
    "ranking": {"ranking": preference_pb2.RankingJudgement(ranks=[0, 1, 1])},
    "rating": {"rating": preference_pb2.RatingJudgement(response=1, value=0.1 + 0.2, low=-4, high=4)},
    "thumbs": {"thumbs": preference_pb2.ThumbsJudgement(response=2, up=True)},
    "edit": {"edit": preference_pb2.EditJudgement(response=0, text="As it should be \u00e9\U0001f600\u0000.")},
    "flag": {"flag": preference_pb2.FlagJudgement(response=0, reason="off_topic", note="It\nwanders.")},
}


def full(kind: str = "pairwise", annotator: str = "ann-1", source: str = "console") -> preference_pb2.Judgement:
    """A judgement with every field set."""
    judgement = preference_pb2.Judgement(
        prompt="What is a \u03bb?",
        prompt_token_ids=[1, 2, 4_294_967_295],
        shown_order=[2, 0, 1],
        annotator=annotator,
        source=source,
        labels={"split": "train", "a": "", "z": "\u00fc"},
        **VERDICTS[kind],
    )
    judgement.judged_at.FromNanoseconds(1_700_000_000_123_456_789)
    for number in range(3):
        judgement.responses.add(
            text=f"response {number}",
            token_ids=[number, 7],
            version=common_pb2.PolicyVersion(run="demo", fence=3, step=number),
            sampling=common_pb2.SamplingParams(max_tokens=24, temperature=0.7, top_p=0.0 + 0.9, seed=2**62 - 1),
            rollout_id=f"g/{number}",
        )
    return judgement


def pair(number: int, annotator: str = "ann-1", source: str = "import", **labels: str) -> preference_pb2.Judgement:
    """A small comparison that differs by its number."""
    judgement = preference_pb2.Judgement(annotator=annotator, source=source, labels=labels)
    judgement.responses.add(text=f"a fine film {number}")
    judgement.responses.add(text=f"a dull film {number}")
    judgement.pairwise.preferred, judgement.pairwise.other = 0, 1
    return judgement


def entries(count: int, start: int = 0, prefix: str = "k", annotator: str = "ann-1") -> list[Entry]:
    """Comparisons under keys of their own."""
    return [Entry(f"{prefix}{n}", pair(n, annotator)) for n in range(start, start + count)]
