"""What all client channels have in common: retries only where they are safe, keepalive, a finite message size."""

from __future__ import annotations

import json
from typing import Final

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024

# gRPC keeps the last word of a stream that its client sends ("no more comes") to itself when it repeats the call at an unlucky
# moment (grpcio 1.85: 11 of 1,205 calls that a service had answered UNAVAILABLE): the repeated call then hangs until its
# deadline. Whoever calls these repeats them by itself.
CLIENT_STREAMING: Final = (
    ("honed.v1.PreferenceService", "ImportJudgements"),
    ("honed.v1.RewardService", "StreamScore"),
)
_SERVICE_CONFIG: Final = json.dumps(
    {
        # Several replicas behind a headless name: spread the calls.
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {"name": [{"service": service, "method": method} for service, method in CLIENT_STREAMING]},
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    # CANCELLED: gRPC's server answers so what had arrived and was not handed to a handler when it stops.
                    # A call that its own caller cancels is never retried.
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            },
        ],
    }
)
CHANNEL_OPTIONS: Final = (
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 200),
    # A replica that was replaced is found again within this time; who replaces the next one waits so long.
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A name is asked again when a connection breaks, and by default not twice within 30 s: where all replicas are replaced one
    # after another, that is a time in which none of those known is left.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
)
