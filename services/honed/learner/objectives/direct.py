"""Losses that learn a policy from what people said, without a reward model: one term for each judgement.

All are of the log ratio of a response, `sum over its tokens of (logp - ref_logp)` in nats, which stands for its reward in units
of `1 / beta`. The reference is the frozen policy that the run started from.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["sigmoid", "ipo", "hinge"]


def direct_preference(margins: Tensor, *, beta: float, kind: Kind = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """The loss of each comparison by how much more the policy, against the reference, prefers the response that people chose.

    With m the margin:

    - "sigmoid", DPO (Rafailov et al. 2023): `-log sigmoid(beta m)`.
    - "ipo" (Azar et al. 2023, eq. 17): `(m - 1 / (2 beta))^2`, beta in the place of the paper's tau.
    - "hinge", SLiC's (Zhao et al. 2023) on log ratios (Liu et al. 2023): `max(0, 1 - beta m)`.

    Margins of "ipo" are made of log ratios divided by the number of their response's tokens, as TRL does and says that the
    paper's authors did: else a long response's margin, squared, outweighs a short one's.

    Args:
        margins: log ratio of the chosen response minus that of the rejected one, `[n]`, nats; for "ipo" nats a token.
        beta: how strongly the policy is held to the reference; positive.
        kind: which loss.
        label_smoothing: e, below 0.5, the probability that a judgement is the wrong way round. The loss is what is expected of
            it, `(1 - e) loss(m) + e loss(-m)`; for "sigmoid" this is cDPO (Mitchell 2023).

    Returns:
        Loss of each comparison, `[n]`.
    """
    loss = _preference_loss(margins, beta, kind)
    if label_smoothing == 0.0:
        return loss
    return (1.0 - label_smoothing) * loss + label_smoothing * _preference_loss(-margins, beta, kind)


def kto(
    log_ratios: Tensor,
    desirable: Tensor,
    reference_kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """The loss of each response that someone called good or bad, by itself (Ethayarajh et al. 2024, eq. 7 and 8).

    `w_D (1 - sigmoid(beta (log_ratio - z)))` of a desirable one, `w_U (1 - sigmoid(beta (z - log_ratio)))` of another, z the KL
    that both are judged against. The paper keeps `w_D n_D / (w_U n_U)` between 1 and 4/3, n the counts in the data.

    Args:
        log_ratios: `[n]`, nats.
        desirable: `[n]`, boolean.
        reference_kl: z, a scalar without gradient: see `mismatched_kl`.
        beta: how strongly the policy is held to the reference; positive.
        desirable_weight: w_D.
        undesirable_weight: w_U.

    Returns:
        Loss of each response, `[n]`.
    """
    gain = torch.where(desirable, log_ratios - reference_kl, reference_kl - log_ratios)
    # Tensors, since a choice between two Python numbers is float32 whatever the log ratios are.
    weights = torch.where(desirable, log_ratios.new_tensor(desirable_weight), log_ratios.new_tensor(undesirable_weight))
    return weights * torch.sigmoid(-beta * gain)


def mismatched_kl(log_ratios: Tensor) -> Tensor:
    """KTO's estimate of the KL between policy and reference: `max(0, mean)`, a scalar without gradient.

    Args:
        log_ratios: `[n]`, nats, of the batch's responses each after the prompt of another, say its neighbour's: a policy that
            learns from its own responses makes them likely, and their log ratios overstate the KL.
    """
    return log_ratios.detach().mean().clamp(min=0.0)


def _preference_loss(margins: Tensor, beta: float, kind: Kind) -> Tensor:
    match kind:
        case "sigmoid":
            return -functional.logsigmoid(beta * margins)
        case "ipo":
            return (margins - 1.0 / (2.0 * beta)).square()
        case "hinge":
            return (1.0 - beta * margins).relu()
        case _:
            assert_never(kind)
