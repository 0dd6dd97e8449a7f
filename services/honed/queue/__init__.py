"""Redis Streams between the stages: one atomic hop, leases, dead letters, admission."""
