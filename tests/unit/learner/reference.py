"""PPO's arithmetic as plain loops over lists in float64, written apart from the product: what the tensor code must equal."""

from __future__ import annotations

import math

Ragged = list[list[float]]


def whiten(rows: Ragged, *, shift_mean: bool) -> Ragged:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / len(flat)
    back = 0.0 if shift_mean else mean
    return [[(x - mean) / math.sqrt(variance + 1e-8) + back for x in row] for row in rows]


def token_rewards(logprobs: Ragged, reference: Ragged, scores: list[float], beta: float) -> Ragged:
    rows = []
    for logp, ref, score in zip(logprobs, reference, scores, strict=True):
        row = [-beta * (a - b) for a, b in zip(logp, ref, strict=True)]
        row[-1] += score
        rows.append(row)
    return rows


def advantages_of(rewards: Ragged, values: Ragged, gamma: float, lam: float) -> Ragged:
    rows = []
    for reward, value in zip(rewards, values, strict=True):
        row = []
        for t in range(len(reward)):
            # The definition, not the recursion: a sum of discounted one-step errors to the end of the response.
            total = 0.0
            for k in range(t, len(reward)):
                following = value[k + 1] if k + 1 < len(reward) else 0.0
                total += (gamma * lam) ** (k - t) * (reward[k] + gamma * following - value[k])
            row.append(total)
        rows.append(row)
    return rows


def estimate(rewards: Ragged, values: Ragged, gamma: float, lam: float) -> tuple[Ragged, Ragged]:
    raw = advantages_of(whiten(rewards, shift_mean=False), values, gamma, lam)
    returns = [[a + v for a, v in zip(row, value, strict=True)] for row, value in zip(raw, values, strict=True)]
    return whiten(raw, shift_mean=True), returns


def losses(
    logprobs: list[float],
    proximal: list[float],
    behaviour: list[float],
    advantages: list[float],
    values: list[float],
    old_values: list[float],
    returns: list[float],
    *,
    clip: float,
    clip_value: float,
    cap: float,
) -> dict[str, float]:
    """Means over tokens of the policy loss, value loss, approxkl and clip fraction."""
    sums = {"policy": 0.0, "value": 0.0, "approxkl": 0.0, "clipped": 0.0}
    for logp, prox, beh, adv, v, old, ret in zip(
        logprobs, proximal, behaviour, advantages, values, old_values, returns, strict=True
    ):
        ratio = math.exp(logp - prox)
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        weight = min(math.exp(prox - beh), cap)
        sums["policy"] += weight * max(-adv * ratio, -adv * bounded)
        near = min(max(v, old - clip_value), old + clip_value)
        sums["value"] += 0.5 * max((v - ret) ** 2, (near - ret) ** 2)
        sums["approxkl"] += 0.5 * (logp - prox) ** 2
        sums["clipped"] += 1.0 if -adv * bounded > -adv * ratio else 0.0
    return {name: total / len(logprobs) for name, total in sums.items()}
