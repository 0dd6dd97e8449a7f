"""The formats that preference data is published in: one line's object to a judgement, and back.

A parser raises FormatError with the reason. A renderer gives None for a judgement that the format has no place for: these
formats know only pairs of which one is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from honed.v1 import preference_pb2 as pb

_TURN = "\n\nAssistant:"


class FormatError(ValueError):
    """An object that is not of the format; says why."""


def parse_trl(record: dict[str, Any]) -> pb.Judgement:
    """Reads `prompt`, `chosen`, `rejected` as TRL's preference data sets have them."""
    return _pair(_text(record, "prompt"), _text(record, "chosen"), _text(record, "rejected"))


def render_trl(judgement: pb.Judgement) -> dict[str, Any] | None:
    """Writes the same."""
    pair = _preferred(judgement)
    return pair and {"prompt": judgement.prompt, "chosen": pair[0], "rejected": pair[1]}


def parse_hh(record: dict[str, Any]) -> pb.Judgement:
    """Reads two transcripts of Anthropic's HH-RLHF: the prompt is what comes before the last turn that they do not share."""
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    end = chosen.rfind(_TURN) + len(_TURN)
    if end < len(_TURN):
        raise FormatError(f"'chosen' has no turn {_TURN!r}")
    prompt = chosen[:end]
    if not rejected.startswith(prompt):
        # A few published pairs part earlier: then the prompt ends at the last turn that both share.
        end = _common_prefix(chosen, rejected).rfind(_TURN) + len(_TURN)
        if end < len(_TURN):
            raise FormatError("'chosen' and 'rejected' share no turns")
        prompt = chosen[:end]
    return _pair(prompt, chosen[end:], rejected[end:])


def render_hh(judgement: pb.Judgement) -> dict[str, Any] | None:
    """Writes two transcripts; a prompt that is no transcript becomes the one turn of the human."""
    pair = _preferred(judgement)
    if pair is None:
        return None
    prompt = judgement.prompt
    if not prompt.endswith(_TURN):
        prompt = f"\n\nHuman: {prompt}{_TURN} "
    return {"chosen": prompt + pair[0], "rejected": prompt + pair[1]}


def parse_summarize(record: dict[str, Any]) -> pb.Judgement:
    """Reads a comparison of OpenAI's summarize-from-feedback: two summaries of a post as shown, and the choice."""
    info, summaries, choice = record.get("info"), record.get("summaries"), record.get("choice")
    if not isinstance(info, dict):
        raise FormatError("no object 'info'")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, dict) for s in summaries):
        raise FormatError("'summaries' is no list of two objects")
    if isinstance(choice, bool) or choice not in (0, 1):
        raise FormatError(f"'choice' is {choice!r}, must be 0 or 1")
    prompt = _text(info, "post" if info.get("post") is not None else "article")
    judgement = _pair(prompt, _text(summaries[choice], "text"), _text(summaries[1 - choice], "text"))
    if choice == 1:  # keeps the responses as they were shown
        judgement.responses.reverse()
        judgement.pairwise.preferred, judgement.pairwise.other = 1, 0
    judgement.shown_order.extend((0, 1))
    for name, value in (("id", info.get("id")), ("split", record.get("split")), ("batch", record.get("batch"))):
        if value:
            judgement.labels[name] = str(value)
    if record.get("worker"):
        judgement.annotator = str(record["worker"])
    return judgement


def render_summarize(judgement: pb.Judgement) -> dict[str, Any] | None:
    """Writes the same."""
    if _preferred(judgement) is None or len(judgement.responses) != 2:
        return None
    return {
        "info": {"id": judgement.labels.get("id", ""), "post": judgement.prompt},
        "summaries": [{"text": response.text} for response in judgement.responses],
        "choice": judgement.pairwise.preferred,
        "worker": judgement.annotator,
        "split": judgement.labels.get("split", ""),
        "batch": judgement.labels.get("batch", ""),
    }


def _pair(prompt: str, chosen: str, rejected: str) -> pb.Judgement:
    judgement = pb.Judgement(prompt=prompt, pairwise=pb.PairwiseJudgement(preferred=0, other=1))
    judgement.responses.add(text=chosen)
    judgement.responses.add(text=rejected)
    return judgement


def _preferred(judgement: pb.Judgement) -> tuple[str, str] | None:
    if judgement.WhichOneof("verdict") != "pairwise" or judgement.pairwise.tie:
        return None
    pair = judgement.pairwise
    return judgement.responses[pair.preferred].text, judgement.responses[pair.other].text


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise FormatError(f"{name!r} is {'missing' if value is None else type(value).__name__}, must be a text")
    return value


def _common_prefix(one: str, other: str) -> str:
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:place]
    return min(one, other, key=len)
