"""Imports the run file's judgements into the preference service, each of them once however often the run starts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from typing import Final

from honed.conductor.settings import JudgementsFile
from honed.formats.files import Defaults, read_judgements
from honed.judgements import Entry
from honed.v1 import preference_pb2, preference_pb2_grpc

BATCH: Final = 2000
TIMEOUT_S: Final = 300.0


async def import_judgements(
    stub: preference_pb2_grpc.PreferenceServiceAsyncStub,
    source: JudgementsFile,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Streams a file in calls of `BATCH` judgements; returns how many lines it has. Repeating it stores nothing twice.

    Args:
        stub: the preference service.
        source: the file and its format.
        progress: called with the number of judgements that are stored.

    Raises:
        HonedError: the file is missing, or a line is no judgement; names both.
        AioRpcError: the service did not store a batch.
    """
    entries = read_judgements(source.file, source.format, Defaults(source.source, source.annotator))
    done = 0
    # Parsing and checking thousands of lines would hold up everything else in this process.
    while batch := await asyncio.to_thread(lambda: list(islice(entries, BATCH))):
        await stub.ImportJudgements(_requests(iter(batch)), timeout=TIMEOUT_S)
        done += len(batch)
        progress(done)
    return done


async def _requests(entries: Iterator[Entry]) -> AsyncIterator[preference_pb2.ImportJudgementsRequest]:
    for entry in entries:
        yield preference_pb2.ImportJudgementsRequest(judgement=entry.judgement, idempotency_key=entry.key)
