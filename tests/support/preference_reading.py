"""Reads a store whole."""

from __future__ import annotations

from honed.preference.store import PreferenceStore
from honed.v1 import preference_pb2


async def everything(
    store: PreferenceStore, selection: preference_pb2.JudgementFilter | None = None, snapshot_id: str = ""
) -> list[preference_pb2.Judgement]:
    found: list[preference_pb2.Judgement] = []
    async for page in store.export(selection or preference_pb2.JudgementFilter(), snapshot_id):
        found += page
    return found
