"""The record of what people said: judgements, their import, export and snapshots."""
