"""Canary log-probabilities: what a policy says of a few fixed texts, for a sampler to prove that it holds the same weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from honed.artifacts.manifest import Canary
from honed.kit.errors import InvalidArgument
from honed.learner.models.policy import TokenModel


@torch.no_grad()
def canary_logprobs(model: TokenModel, texts: Sequence[Sequence[int]], *, start: int = 1) -> list[Canary]:
    """Reads each text with the model in full precision, whatever the model trains in.

    Args:
        model: the policy.
        texts: token ids, each longer than `start`.
        start: see `Canary`.

    Raises:
        InvalidArgument: when a text is too short or `start` is 0.
    """
    if start < 1:
        raise InvalidArgument("start", "must be at least 1: the first token has nothing to be predicted from")
    records: list[Canary] = []
    for at, text in enumerate(texts):
        if len(text) <= start:
            raise InvalidArgument(f"texts[{at}]", f"has {len(text)} tokens, needs more than {start}")
        tokens = torch.tensor([list(text)], device=model.device)
        logits = model.language_model(input_ids=tokens[:, :-1], use_cache=False).logits[0, start - 1 :]
        log_probs = logits.float().log_softmax(-1)
        chosen = log_probs.gather(1, tokens[0, start:].unsqueeze(1)).squeeze(1)
        records.append(Canary(token_ids=tuple(text), start=start, logprobs=tuple(chosen.tolist())))
    return records
