"""GRPO (Shao et al. 2024): a response's advantage is its score among the responses to the same prompt; there is no value head.

`A_i = (r_i - mean) / std` of the group, the same at each token; the clipped surrogate of PPO; and in the loss `beta` times the
k3 estimate of the KL to the reference. The paper's beta is `learner.kl: {controller: fixed, coefficient: 0.04}`; the default
of `learner.kl` is lm-human-preferences' adaptive one. Its successors are options of it:

- Dr. GRPO (Liu et al. 2025): `scale: none`, `reduction: constant`, `constant` the most tokens that a response may have.
- DAPO (Yu et al. 2025): `clip_high: 0.28`, `reduction: tokens`, `leave_out_cut: true` (its overlong filtering). Not part of
  it here: dynamic sampling, which replaces groups whose responses all have one score (they count in `constant_groups`), and
  the soft overlong punishment. The scorer `length` is no such: its price is on every word, DAPO's on the last tokens alone.
- GSPO (Zheng et al. 2025): `ratio: response`, with clip ranges of about 3e-4.
- CISPO (MiniMax-M1, 2025): `surrogate: cispo`, `reduction: tokens`, with a large `clip_high`.

Dr. GRPO, DAPO and CISPO have no KL term: with each goes `learner.kl: {controller: fixed, coefficient: 0.0}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from honed.kit.errors import InvalidArgument
from honed.learner import objectives
from honed.learner.algorithms.base import Losses, Needs, OnPolicy, algorithm
from honed.settings import Positive, Section

if TYPE_CHECKING:
    from torch import Tensor

    from honed.learner.models.policy import TokenEvaluation
    from honed.learner.settings import LearnerSettings
    from honed.learner.train.sampled import Sampled


class Options(Section):
    """What GRPO and its successors have of their own."""

    scale: Literal["group", "batch", "none"] = Field("group", description="Whose deviation advantages are divided by.")
    ratio: Literal["token", "response"] = Field("token", description="What the ratio to the proximal policy is of.")
    surrogate: Literal["clipped", "cispo"] = "clipped"
    clip_high: Annotated[float, Field(gt=0)] | None = Field(
        None, description="How far over 1 the ratio may go; null: as far as under it, learner.clip_ratio."
    )
    reduction: Literal["responses", "tokens", "constant"] = Field(
        "responses",
        description="Mean over responses of their tokens' means, mean over tokens, or sums over one constant.",
    )
    constant: Positive | None = Field(
        None,
        description="For reduction constant, which needs it: what a response's sum is divided by; conductor.response_tokens is "
        "usual.",
    )
    leave_out_cut: bool = Field(False, description="Responses that reached the limit of their length do not train.")


@algorithm("grpo", Options, reads=("clip_ratio",), epochs=4)
class GRPO(OnPolicy):
    """Group relative policy optimisation."""

    def __init__(self, learner: LearnerSettings, options: Options) -> None:
        """See `OnPolicy`.

        Raises:
            InvalidArgument: The reduction needs a constant, or there is one that it does not read; the surrogate does not read
                the clip ratio.
        """
        if options.reduction == "constant" and options.constant is None:
            raise InvalidArgument(
                "learner.options.constant",
                "reduction constant divides by it, and it has no default: set it; the most tokens that a response may have, "
                "conductor.response_tokens, is usual",
            )
        if options.reduction != "constant" and options.constant is not None:
            raise InvalidArgument(
                "learner.options.constant", f"reduction {options.reduction} does not read it: leave it out, or take constant"
            )
        chosen = learner.clip_ratio != type(learner).model_fields["clip_ratio"].default
        if options.surrogate == "cispo" and options.clip_high is not None and chosen:
            raise InvalidArgument(
                "learner.clip_ratio", "surrogate cispo bounds a ratio from above alone, by clip_high: leave one of the two out"
            )
        self._options, self._low = options, learner.clip_ratio
        self._high = learner.clip_ratio if options.clip_high is None else options.clip_high
        self.needs = Needs(reference=learner.kl.coefficient > 0, group=2)

    def rows(self, batch: Sampled) -> Mapping[str, Tensor]:
        """Advantages, and what the loss of each token counts in the sum."""
        advantages = objectives.group.relative_advantages(batch.scores, batch.groups, self._options.scale)
        trained = batch.mask & ~batch.cut.unsqueeze(1) if self._options.leave_out_cut else batch.mask
        trained = trained.to(batch.proximal.dtype)
        match self._options.reduction:
            case "responses":
                share = trained / batch.mask.sum(1, keepdim=True)
            case "tokens":
                share = trained
            case "constant":
                assert self._options.constant is not None  # refused at the start
                share = trained / self._options.constant
        return {"advantages": advantages.to(trained.dtype).unsqueeze(1) * batch.mask, "share": share, "trained": trained}

    def losses(self, batch: Sampled, now: TokenEvaluation, at: Mapping[str, Tensor]) -> Losses:
        """The surrogate, and the price of the KL to the reference."""
        surrogates, advantages = objectives.policy_gradient, at["advantages"]
        if self._options.ratio == "token":
            ratio = (now.logprobs - at["proximal"]).exp()
        else:
            ratio = surrogates.response_ratios(now.logprobs, at["proximal"], at["response"], mean=True)
        if self._options.surrogate == "clipped":
            policy_loss = surrogates.clipped_surrogate(ratio, advantages, low=self._low, high=self._high)
            clipped = policy_loss > -advantages * ratio
        else:
            policy_loss = surrogates.clipped_importance_loss(now.logprobs, ratio, advantages, high=self._high)
            clipped = ratio > 1.0 + self._high
        policy_loss = policy_loss * at["weights"]
        figures = {"policy_loss": policy_loss, "clip_fraction": clipped.to(policy_loss.dtype)}
        loss = policy_loss
        if self.needs.reference:
            kl = surrogates.reference_kl_terms(now.logprobs, at["reference"])
            loss = loss + batch.beta * kl
        over = "tokens" if self._options.reduction == "tokens" else "responses"
        return Losses({over: (loss * at["share"]).sum()}, figures)

    def figures(self, batch: Sampled, rows: Mapping[str, Tensor]) -> Mapping[str, float]:
        """`constant_groups`: the share of prompts whose responses all had the same score, and taught nothing."""
        return {"constant_groups": objectives.group.constant_share(batch.scores, batch.groups)}
