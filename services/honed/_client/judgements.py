"""Judgements out of what an application has at hand: samples or texts, and what a person said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from honed._client.values import Sample
from honed.v1 import common_pb2, preference_pb2

Response = Sample | str


class FeedbackOptions(TypedDict, total=False):
    """What may be said of a judgement beside the verdict.

    Attributes:
        prompt: what the responses answer; samples know by themselves.
        source: where the judgement comes from; `application` unless said otherwise.
        labels: words to select it by.
        key: names this judgement for ever: the same key again stores nothing twice. Unset: one is made for this call and its
            retries.
    """

    prompt: str
    source: str
    labels: Mapping[str, str]
    key: str


def judgement(responses: Sequence[Response], annotator: str, about: FeedbackOptions) -> preference_pb2.Judgement:
    """A judgement that lacks its verdict.

    Args:
        responses: what was judged, in the order shown.
        annotator: who judged, as a pseudonym.
        about: what else is known.

    Raises:
        ValueError: the samples answer different prompts.
    """
    samples = [response for response in responses if isinstance(response, Sample)]
    prompts = {(sample.prompt, sample.prompt_token_ids) for sample in samples}
    if len(prompts) > 1:
        raise ValueError("the samples answer different prompts: one judgement is about the responses to one prompt")
    text, token_ids = prompts.pop() if prompts else ("", ())
    if about.get("prompt", text) != text:
        text, token_ids = about["prompt"], ()
    return preference_pb2.Judgement(
        prompt=text,
        prompt_token_ids=token_ids,
        responses=[_judged(response) for response in responses],
        shown_order=range(len(responses)),
        annotator=annotator,
        source=about.get("source", "application"),
        labels=about.get("labels"),
    )


def _judged(response: Response) -> preference_pb2.JudgedResponse:
    if isinstance(response, str):
        return preference_pb2.JudgedResponse(text=response)
    judged = preference_pb2.JudgedResponse(text=response.text, token_ids=response.token_ids, sampling=response.sampling)
    # The record has one version for a response; of one that several versions sampled it says none rather than a wrong one.
    if (version := response.version) is not None:
        judged.version.CopyFrom(common_pb2.PolicyVersion(run=version.run, fence=version.fence, step=version.step))
    return judged
