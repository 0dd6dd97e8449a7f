"""Prometheus metrics of the reward service."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

BATCH_ITEMS = Histogram("honed_reward_batch_items", "Items of a dynamic batch.", buckets=_SIZES)
WAIT = Histogram(
    "honed_reward_wait_seconds",
    "Time from an item's arrival to the start of its batch.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
QUEUED = Gauge("honed_reward_queued_items", "Items that wait for a batch.")
TOKENS = Counter("honed_reward_tokens_total", "Tokens scored; text is estimated.")
COMPUTE = Counter("honed_reward_compute_seconds_total", "Time spent in scorers; tokens over this is the service rate.")
TOKENS_PER_SECOND = Gauge("honed_reward_tokens_per_second", "The service rate, smoothed over the last batches.")
SCORED = Counter("honed_reward_items_total", "Items by outcome: scored, failed, skipped.", ["outcome"])
REFUSED = Counter("honed_reward_refused_total", "Items refused because the queue was full.")
MISSING_TOKEN = Counter("honed_reward_missing_truncation_total", "Responses without the truncation token.")
PROMOTIONS = Counter("honed_reward_promotions_total", "Promotions, by scorer.", ["scorer"])
ROLLOUTS = Counter(
    "honed_reward_rollouts_total", "Rollouts by how they left: handed_on, lost, retried, released, dead.", ["outcome"]
)
WORKING = Gauge("honed_reward_working", "1 while rollouts are taken from Redis and scored, 0 while a scorer or Redis is away.")
